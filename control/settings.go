package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"echod/server"
)

// Setting is a setting of the server. Its values are text in the form of the flag with its name.
type Setting struct {
	Name       string `json:"name"`
	Value      string `json:"value"`
	AtStart    string `json:"at_start"`   // from the flags or the environment; a restart restores it
	Changeable bool   `json:"changeable"` // reports whether it can change while the server runs
}

// Settings answers GET /v1/settings.
type Settings struct {
	Settings []Setting `json:"settings"`
}

// SettingChange is a setting that has changed.
type SettingChange struct {
	Name string `json:"name"`
	Old  string `json:"old"`
	New  string `json:"new"`
}

// SettingsChanged answers PATCH /v1/settings.
type SettingsChanged struct {
	Changed bool            `json:"changed"`
	Changes []SettingChange `json:"changes"`
	// Until says how long the changes last.
	Until string `json:"until"`
}

// untilRestart is the value of Until. An upgrade keeps the changes.
const untilRestart = "restart"

func (p *Plane) getSettings(w *response, r *http.Request) error {
	if err := decodeQuery(r, nil); err != nil {
		return err
	}
	now := p.srv.Settings()
	atStart := map[string]string{}
	for _, c := range p.srv.Status().Settings {
		atStart[c.Name] = c.Old
	}
	out := Settings{Settings: []Setting{}}
	for _, name := range server.SettingNames() {
		setting := Setting{Name: name, Value: now.Get(name), AtStart: now.Get(name), Changeable: true}
		if old, ok := atStart[name]; ok {
			setting.AtStart = old
		}
		out.Settings = append(out.Settings, setting)
	}
	for _, fixed := range p.fixed {
		out.Settings = append(out.Settings, Setting{Name: fixed.Name, Value: fixed.Value, AtStart: fixed.Value})
	}
	return answerJSON(w, http.StatusOK, out)
}

// settingEdit is the change of one setting in a request.
type settingEdit struct {
	value       *string  // the new value; nil means add and remove
	add, remove []string // entries of a list
}

func (p *Plane) patchSettings(w *response, r *http.Request) error {
	edits := map[string]settingEdit{}
	want := fields{}
	for _, name := range server.SettingNames() {
		want[name] = func(raw json.RawMessage) (err error) {
			edits[name], err = decodeEdit(raw)
			return err
		}
	}
	for _, fixed := range p.fixed {
		want[fixed.Name] = func(json.RawMessage) error { return errFixed }
	}
	if err := errors.Join(decodeQuery(r, nil), decodeBody(w, r, want)); err != nil {
		return err
	}
	if len(edits) == 0 {
		return invalid("body", "say what to change: %s", want.describe())
	}
	changes, err := p.srv.Configure(callerFrom(r.Context()).identity(), func(s *server.Settings) error {
		for _, name := range server.SettingNames() {
			if edit, ok := edits[name]; ok {
				if err := edit.apply(s, name); err != nil {
					return invalid(name, "%s", err)
				}
			}
		}
		return nil
	})
	_, isDraining := errors.AsType[*server.DrainingError](err)
	problem, isProblem := errors.AsType[*Problem](err)
	switch {
	case isProblem:
		return problem
	case isDraining:
		return err
	case err != nil:
		return invalid("body", "%s", strings.TrimPrefix(err.Error(), "configuring: "))
	}
	return answerJSON(w, http.StatusOK, SettingsChanged{
		Changed: len(changes) > 0, Changes: wireChanges(changes), Until: untilRestart,
	})
}

var errFixed = errors.New("it cannot change while the server runs: set it and restart")

// decodeEdit decodes a text, a number, a list of texts, or {"add": list, "remove": list}.
func decodeEdit(raw json.RawMessage) (edit settingEdit, err error) {
	const want = "text, a number, or a list of texts"
	var v any
	if err := unmarshal(raw, &v, want); err != nil {
		return edit, err
	}
	switch v := v.(type) {
	case string:
		edit.value = &v
		return edit, nil
	case float64:
		edit.value = new(strconv.FormatFloat(v, 'f', -1, 64))
		return edit, nil
	case map[string]any:
		return edit, decodeObject(raw, fields{"add": texts(&edit.add), "remove": texts(&edit.remove)})
	case []any:
		var list []string
		err := texts(&list)(raw)
		edit.value = new(strings.Join(list, ","))
		return edit, err
	}
	return edit, fmt.Errorf("%s is not %s", shorten(string(raw)), want)
}

func texts(to *[]string) decoder {
	return func(raw json.RawMessage) error { return unmarshal(raw, to, "a list of texts") }
}

func (e settingEdit) apply(s *server.Settings, name string) error {
	if e.value != nil {
		return s.Set(name, *e.value)
	}
	if name != "allow" && name != "deny" {
		return errors.New("it is not a list: give its value")
	}
	list := slices.DeleteFunc(strings.Split(s.Get(name), ","), func(text string) bool { return text == "" })
	for _, text := range e.remove {
		r, err := server.ParseRange(text)
		if err != nil {
			return err
		}
		at := slices.Index(list, r.String())
		if at < 0 {
			return fmt.Errorf("%s is not in it", r)
		}
		list = slices.Delete(list, at, at+1)
	}
	for _, text := range e.add {
		r, err := server.ParseRange(text)
		if err != nil {
			return err
		}
		if !slices.Contains(list, r.String()) {
			list = append(list, r.String())
		}
	}
	return s.Set(name, strings.Join(list, ","))
}

func wireChanges(changes []server.SettingChange) []SettingChange {
	out := []SettingChange{}
	for _, c := range changes {
		out = append(out, SettingChange(c))
	}
	return out
}

// Settings returns the server's settings: first those that can change while it runs.
func (c *Client) Settings(ctx context.Context) (out Settings, err error) {
	return out, c.call(ctx, http.MethodGet, "/v1/settings", nil, nil, &out)
}

// ListEdit adds entries to a setting that is a list, and removes others.
type ListEdit struct {
	Add    []string `json:"add,omitempty"`
	Remove []string `json:"remove,omitempty"`
}

// ChangeSettings changes settings by name. If one is invalid, it changes none. A value is text in the form of
// the setting's flag, or a ListEdit.
func (c *Client) ChangeSettings(ctx context.Context, values map[string]any) (out SettingsChanged, err error) {
	return out, c.call(ctx, http.MethodPatch, "/v1/settings", nil, values, &out)
}
