package control

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"echod/server"
)

// Requests are decoded strictly. If a field or parameter is unknown, given twice, null or of the wrong type, the answer is
// a problem that names it. json.Decoder does not suffice, even with DisallowUnknownFields: it accepts two values, null and
// names in another case, and its errors do not always name the field.

// maxBody bounds a request's body, in bytes.
const maxBody = 16 << 10

// fields maps the names of the fields that a request may have to their decoders.
type fields map[string]decoder

// A decoder stores one value: a field's JSON, or a query parameter as JSON. Its error says what is wrong
// without the name of the field.
type decoder func(json.RawMessage) error

// decodeBody decodes the request's JSON object. An empty body means an empty object.
func decodeBody(w http.ResponseWriter, r *http.Request, want fields) error {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		return &Problem{
			Type: ProblemTooLarge, Title: "Request too large", Status: http.StatusRequestEntityTooLarge,
			Detail: "body: more than " + strconv.Itoa(maxBody) + " bytes", Field: "body",
		}
	}
	switch {
	case err != nil:
		return invalid("body", "reading it: %s", describeEOF(err))
	case len(bytes.TrimSpace(body)) == 0:
		return nil
	case !utf8.Valid(body):
		return invalid("body", "not valid UTF-8") // encoding/json would replace the invalid bytes
	}
	return decodeObject(body, want)
}

func decodeObject(body []byte, want fields) error {
	dec := json.NewDecoder(bytes.NewReader(body))
	if open, err := dec.Token(); err != nil || open != json.Delim('{') {
		return invalid("body", "want a JSON object")
	}
	seen := map[string]bool{}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return invalid("body", "not valid JSON: %s", describeEOF(err))
		}
		name, _ := key.(string)
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return invalid(name, "not valid JSON: %s", describeEOF(err))
		}
		decode, known := want[name]
		switch {
		case !known:
			return invalid(name, "unknown field: %s", want.describe())
		case seen[name]:
			return invalid(name, "given twice")
		}
		seen[name] = true
		if err := decode(value); err != nil {
			return invalid(name, "%s", err)
		}
	}
	if _, err := dec.Token(); err != nil {
		return invalid("body", "not valid JSON: %s", describeEOF(err))
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return invalid("body", "unexpected data after the JSON object")
	}
	return nil
}

// describeEOF replaces an error for a body that ends too early by one that says so.
func describeEOF(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("it ends too early")
	}
	return err
}

// decodeQuery decodes the request's query.
func decodeQuery(r *http.Request, want fields) error {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return invalid("query", "%s", err)
	}
	for _, name := range slices.Sorted(maps.Keys(query)) {
		decode, known := want[name]
		switch {
		case !known:
			return invalid(name, "unknown parameter: %s", want.describe())
		case len(query[name]) > 1:
			return invalid(name, "given twice")
		}
		if err := decode(queryJSON(query[name][0])); err != nil {
			return invalid(name, "%s", err)
		}
	}
	return nil
}

// queryJSON returns a parameter's text as JSON: a number, true, false, or otherwise a string.
func queryJSON(text string) json.RawMessage {
	if _, err := strconv.ParseInt(text, 10, 64); err == nil || text == "true" || text == "false" {
		return json.RawMessage(text)
	}
	quoted, _ := json.Marshal(text) // encoding a string cannot fail
	return quoted
}

// describe lists the names of the fields, for an error.
func (f fields) describe() string {
	if len(f) == 0 {
		return "want none"
	}
	return "want " + strings.Join(slices.Sorted(maps.Keys(f)), ", ")
}

// lineField decodes a string that passes server.CheckText, because it may be sent to clients, logs and terminals.
func lineField(to *string) decoder {
	return func(raw json.RawMessage) error {
		if err := unmarshal(raw, to, "a string"); err != nil {
			return err
		}
		return server.CheckText(*to)
	}
}

// durationField decodes a string with a Go duration, such as "1.5s". It must not be negative.
func durationField(to *time.Duration) decoder {
	return func(raw json.RawMessage) error {
		const want = `a duration such as "1.5s"`
		var s string
		if err := unmarshal(raw, &s, want); err != nil {
			return err
		}
		d, err := time.ParseDuration(s)
		if err != nil {
			return errors.New(strconv.Quote(shorten(s)) + " is not " + want)
		}
		if d < 0 {
			return errors.New(s + " is negative")
		}
		*to = d
		return nil
	}
}

func boolField(to *bool) decoder {
	return func(raw json.RawMessage) error { return unmarshal(raw, to, "true or false") }
}

// countField decodes a whole number. It must not be negative.
func countField(to *int) decoder {
	return func(raw json.RawMessage) error {
		const want = "a whole number"
		if err := unmarshal(raw, to, want); err != nil {
			return err
		}
		if *to < 0 {
			return errors.New(string(raw) + " is negative")
		}
		return nil
	}
}

// eventIDField decodes the id of an event, and sets given.
func eventIDField(to *uint64, given *bool) decoder {
	return func(raw json.RawMessage) error {
		*given = true
		return unmarshal(raw, to, "the id of an event")
	}
}

func pauseModeField(to *server.PauseMode) decoder {
	return func(raw json.RawMessage) (err error) {
		var name string
		if err = unmarshal(raw, &name, "hold or reject"); err == nil {
			*to, err = server.ParsePauseMode(name)
		}
		return err
	}
}

func stateField(to *server.State) decoder {
	return func(raw json.RawMessage) (err error) {
		var name string
		if err = unmarshal(raw, &name, "a state"); err == nil {
			*to, err = server.ParseState(name)
		}
		return err
	}
}

// wordField accepts only the given word, and sets to.
func wordField(word string, to *bool) decoder {
	return func(raw json.RawMessage) error {
		var got string
		if err := unmarshal(raw, &got, word); err != nil || got != word {
			return errors.New(shorten(string(raw)) + " is not " + word)
		}
		*to = true
		return nil
	}
}

func unmarshal(raw json.RawMessage, to any, want string) error {
	if string(raw) == "null" || json.Unmarshal(raw, to) != nil {
		return errors.New(shorten(string(raw)) + " is not " + want)
	}
	return nil
}

// shorten cuts a long value for an error.
func shorten(s string) string { return atMost(60, s) }

// atMost returns at most the first n bytes of s.
func atMost(n int, s string) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "…"
}
