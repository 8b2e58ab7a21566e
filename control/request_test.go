package control

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"echod/server"
)

// decoded has a field for each decoder.
type decoded struct {
	Text     string
	Duration time.Duration
	Count    int
	Bool     bool
	Mode     server.PauseMode
	State    server.State
	Word     bool
}

func (d *decoded) fields() fields {
	return fields{
		"text": lineField(&d.Text), "duration": durationField(&d.Duration), "count": countField(&d.Count), "bool": boolField(&d.Bool),
		"mode": pauseModeField(&d.Mode), "state": stateField(&d.State), "word": wordField("please", &d.Word),
	}
}

func decodeText(body string) (got decoded, err error) {
	r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(body))
	err = decodeBody(httptest.NewRecorder(), r, got.fields())
	return got, err
}

func TestDecodeBody(t *testing.T) {
	for body, want := range map[string]decoded{
		"":                       {},
		" \r\n\t":                {},
		"{}":                     {},
		`{"text":"" }`:           {},
		`{"text":"héllo ☃"}`:     {Text: "héllo ☃"},
		`{"duration":"1h2.5s"}`:  {Duration: time.Hour + 2500*time.Millisecond},
		`{"duration":"0"}`:       {},
		`{"count":12}`:           {Count: 12},
		`{"bool":true}`:          {Bool: true},
		`{"mode":"reject"}`:      {Mode: server.PauseReject},
		`{"state":"paused"}`:     {State: server.StatePaused},
		`{"word":"please"}`:      {Word: true},
		"\n{ \"count\" : 1 }\n":  {Count: 1},
		`{"count":1,"text":"x"}`: {Count: 1, Text: "x"},
	} {
		got, err := decodeText(body)
		wantEqual(t, body, got, want)
		wantEqual(t, body+": error", err, nil)
	}
}

func TestDecodeBodyStrictly(t *testing.T) {
	for _, bad := range []struct{ name, body, field, says string }{
		{"unknown field", `{"tex":"x"}`, "tex", "unknown field: want bool, count, duration, mode, state, text, word"},
		{"another case", `{"Text":"x"}`, "Text", "unknown field"},
		{"empty name", `{"":1}`, "", "unknown field"},
		{"duplicate field", `{"text":"x","text":"x"}`, "text", "given twice"},
		{"duplicate field, one escaped", `{"text":"x","\u0074ext":"x"}`, "text", "given twice"},
		{"null", `{"text":null}`, "text", "null is not a string"},
		{"null number", `{"count":null}`, "count", "null is not a whole number"},
		{"number for text", `{"text":1}`, "text", "1 is not a string"},
		{"object for text", `{"text":{"a":1}}`, "text", `{"a":1} is not a string`},
		{"control character", `{"text":"a\nb"}`, "text", "control character"},
		{"C1 control character", `{"text":"a\u009bb"}`, "text", "control character"},
		{"bidirectional control", `{"text":"a\u202eb"}`, "text", "control character"},
		{"line separator", `{"text":"a\u2028b"}`, "text", "control character"},
		{"long text", `{"text":"` + strings.Repeat("x", 1025) + `"}`, "text", "1025 bytes: at most 1024 are allowed"},
		{"number for duration", `{"duration":5}`, "duration", `5 is not a duration such as "1.5s"`},
		{"no unit", `{"duration":"5"}`, "duration", `"5" is not a duration`},
		{"negative duration", `{"duration":"-5s"}`, "duration", "-5s is negative"},
		{"duration that overflows", `{"duration":"9999999h"}`, "duration", "is not a duration"},
		{"fraction", `{"count":1.5}`, "count", "1.5 is not a whole number"},
		{"exponent", `{"count":1e3}`, "count", "1e3 is not a whole number"},
		{"text for count", `{"count":"1"}`, "count", `"1" is not a whole number`},
		{"negative count", `{"count":-1}`, "count", "-1 is negative"},
		{"huge count", `{"count":99999999999999999999}`, "count", "is not a whole number"},
		{"text for a boolean", `{"bool":"true"}`, "bool", `"true" is not true or false`},
		{"number for a boolean", `{"bool":1}`, "bool", "1 is not true or false"},
		{"unknown mode", `{"mode":"halt"}`, "mode", `unknown mode "halt": want hold or reject`},
		{"mode of another type", `{"mode":true}`, "mode", "true is not hold or reject"},
		{"unknown state", `{"state":"asleep"}`, "state", "asleep"},
		{"state of another type", `{"state":[]}`, "state", "[] is not a state"},
		{"another word", `{"word":"now"}`, "word", `"now" is not please`},
		{"array", `[]`, "body", "want a JSON object"},
		{"string", `"text"`, "body", "want a JSON object"},
		{"null body", `null`, "body", "want a JSON object"},
		{"no JSON", `text=x`, "body", "want a JSON object"},
		{"trailing object", `{}{}`, "body", "unexpected data after"},
		{"trailing garbage", `{"count":1}]`, "body", "unexpected data after"},
		{"trailing comma", `{"count":1,}`, "body", "not valid JSON"},
		{"leading comma", `{,"count":1}`, "body", "not valid JSON"},
		{"no colon", `{"count" 1}`, "count", "not valid JSON"},
		{"number for a name", `{1:2}`, "body", "not valid JSON"},
		{"truncated at the brace", `{`, "body", "it ends too early"},
		{"truncated in a name", `{"co`, "body", "it ends too early"},
		{"truncated after a name", `{"count"`, "count", "it ends too early"},
		{"truncated after the colon", `{"count":`, "count", "it ends too early"},
		{"truncated in a value", `{"text":"x`, "text", "it ends too early"},
		{"truncated after a value", `{"count":1`, "body", "it ends too early"},
		{"truncated after a comma", `{"count":1,`, "body", "it ends too early"},
		{"not UTF-8", "{\"text\":\"\xff\"}", "body", "not valid UTF-8"},
	} {
		t.Run(bad.name, func(t *testing.T) {
			_, err := decodeText(bad.body)
			problem := wantProblem(t, err, ProblemInvalid)
			wantEqual(t, "status", problem.Status, http.StatusBadRequest)
			wantEqual(t, "field", problem.Field, bad.field)
			if !strings.HasPrefix(problem.Detail, bad.field+": ") || !strings.Contains(problem.Detail, bad.says) {
				t.Errorf("detail is %q: want it to name %q and to say %q", problem.Detail, bad.field, bad.says)
			}
		})
	}
}

func TestDecodeBodyLimit(t *testing.T) {
	fits := `{"count":1` + strings.Repeat(" ", maxBody-len(`{"count":1}`)) + `}`
	got, err := decodeText(fits)
	wantEqual(t, "the largest body", got, decoded{Count: 1})
	wantEqual(t, "its error", err, nil)

	_, err = decodeText(fits + " ")
	problem := wantProblem(t, err, ProblemTooLarge)
	wantEqual(t, "status", problem.Status, http.StatusRequestEntityTooLarge)
	wantEqual(t, "field", problem.Field, "body")
}

func decodeTarget(query string) (got decoded, err error) {
	err = decodeQuery(httptest.NewRequest(http.MethodGet, "/?"+query, http.NoBody), got.fields())
	return got, err
}

func TestDecodeQuery(t *testing.T) {
	for query, want := range map[string]decoded{
		"":                            {},
		"count=12":                    {Count: 12},
		"bool=false&count=0":          {},
		"bool=true":                   {Bool: true},
		"duration=1.5s":               {Duration: 1500 * time.Millisecond},
		"duration=1%2e5s":             {Duration: 1500 * time.Millisecond},
		"state=draining&word=please":  {State: server.StateDraining, Word: true},
		"text=a+b%20c&mode=hold":      {Text: "a b c"},
		"text=nothing&duration=2562h": {Text: "nothing", Duration: 2562 * time.Hour},
	} {
		got, err := decodeTarget(query)
		wantEqual(t, query, got, want)
		wantEqual(t, query+": error", err, nil)
	}
}

func TestDecodeQueryStrictly(t *testing.T) {
	for _, bad := range []struct{ name, query, field, says string }{
		{"unknown", "limit=1", "limit", "unknown parameter: want bool"},
		{"given twice", "count=1&count=1", "count", "given twice"},
		{"no value", "count", "count", `"" is not a whole number`},
		{"negative", "count=-1", "count", "-1 is negative"},
		{"plus", "count=%2B1", "count", "+1 is not a whole number"},
		{"space", "count=%201", "count", "is not a whole number"},
		{"quoted", "word=%22please%22", "word", "is not please"},
		{"quoted behind a space", "word=%20%22please%22", "word", "is not please"},
		{"JSON", "count=[1]", "count", "is not a whole number"},
		{"yes", "bool=yes", "bool", `"yes" is not true or false`},
		{"no unit", "duration=5", "duration", "5 is not a duration"},
		{"negative duration", "duration=-1ms", "duration", "-1ms is negative"},
		{"null", "state=null", "state", "null"},
		{"bad escape", "count=1&duration=%zz", "query", "invalid URL escape"},
		{"semicolon", "count=1;duration=1s", "query", "semicolon"},
	} {
		t.Run(bad.name, func(t *testing.T) {
			_, err := decodeTarget(bad.query)
			problem := wantProblem(t, err, ProblemInvalid)
			wantEqual(t, "field", problem.Field, bad.field)
			if !strings.Contains(problem.Detail, bad.says) {
				t.Errorf("detail is %q: want it to say %q", problem.Detail, bad.says)
			}
		})
	}
}

func TestProblemsAreShort(t *testing.T) {
	long := strings.Repeat("é", 5000)
	for _, body := range []string{`{"` + long + `":1}`, `{"duration":"` + long + `"}`, `{"mode":"` + long + `"}`, `{"count":"` + long + `"}`} {
		_, err := decodeText(body)
		problem := (&Plane{}).problemOf(err)
		if n := len(problem.Detail) + len(problem.Field); n > 700 {
			t.Errorf("%.20s…: the problem has %d bytes", body, n)
		}
		if !utf8.ValidString(problem.Detail + problem.Field) {
			t.Errorf("%.20s…: the problem is cut within a character: %q", body, problem.Detail)
		}
	}
}

// TestStandardDecoderIsLax shows why encoding/json alone does not decode requests.
func TestStandardDecoderIsLax(t *testing.T) {
	for _, body := range []string{`{"text":"x","text":"y"}`, `{"TEXT":"x"}`, `{"text":null}`, `{} {}`} {
		dec := json.NewDecoder(strings.NewReader(body))
		dec.DisallowUnknownFields()
		var got struct {
			Text string `json:"text"`
		}
		if err := dec.Decode(&got); err != nil {
			t.Errorf("%s: encoding/json refuses it by now: %v", body, err)
		}
		if _, err := decodeText(body); err == nil {
			t.Errorf("%s: decoded without an error", body)
		}
	}
}

// FuzzDecodeBody checks that every body is either decoded as encoding/json does, or refused with a problem that names
// a field.
func FuzzDecodeBody(f *testing.F) {
	for _, seed := range []string{
		``, `{}`, `{"text":"x"}`, `{"duration":"1s","count":3,"bool":true}`, `{"text":"x","text":"y"}`, `{"count":null}`,
		`{"mode":"hold","state":"running","word":"please"}`, `{"a":1}`, `[]`, `{"text":"`, `{"text" "x"}`, `{} x`, "{\"text\":\"\xff\"}", `{"text":"\ud800"}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		got, err := decodeText(string(body))
		if err != nil {
			problem, ok := errors.AsType[*Problem](err)
			if !ok {
				t.Fatalf("error is %v: want a problem", err)
			}
			wantStatus, wantType := http.StatusBadRequest, ProblemInvalid
			if len(body) > maxBody {
				wantStatus, wantType = http.StatusRequestEntityTooLarge, ProblemTooLarge
			}
			wantEqual(t, "status", problem.Status, wantStatus)
			wantEqual(t, "type", problem.Type, wantType)
			if !strings.HasPrefix(problem.Detail, problem.Field+": ") || strings.HasSuffix(problem.Detail, "EOF") {
				t.Errorf("detail is %q: want it to name %q, and words", problem.Detail, problem.Field)
			}
			return
		}
		if len(bytes.TrimSpace(body)) == 0 {
			wantEqual(t, "decoded", got, decoded{})
			return
		}
		var lax struct {
			Text, Duration, Mode, State, Word string
			Count                             json.Number
			Bool                              bool
		}
		dec := json.NewDecoder(bytes.NewReader(body))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&lax); err != nil || dec.More() {
			t.Fatalf("%q was taken, and encoding/json says %v", body, err)
		}
		wantEqual(t, "text", got.Text, lax.Text)
		wantEqual(t, "bool", got.Bool, lax.Bool)
		wantEqual(t, "word", got.Word, lax.Word == "please")
		if lax.Count != "" {
			wantEqual(t, "count", strconv.Itoa(got.Count), strings.TrimPrefix(lax.Count.String(), "-"))
		}
		if lax.Duration != "" {
			d, err := time.ParseDuration(lax.Duration)
			wantEqual(t, "duration", got.Duration, d)
			wantEqual(t, "its error", err, nil)
		}
	})
}
