package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestReadVariables(t *testing.T) {
	for text, want := range map[string]string{
		"A=b":                "A=b",
		"A= b c ":            "A=b c",
		`A="b c" `:           "A=b c",
		`A='b\n'`:            `A=b\n`,
		`A="b\n\"\$"`:        `A=b\n"$`,
		`A=b\ c\n`:           "A=b cn",
		`A=b"c"'d'`:          "A=bcd",
		"#A=b\n;A=c\n\n A=d": "A=d",
		"A=b\\\nc":           "A=bc",
		"A=":                 "A=",
		"A=b=c":              "A=b=c",
	} {
		path := filepath.Join(t.TempDir(), "env")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := readVariables(path)
		if err != nil || !slices.Equal(got, []string{want}) {
			t.Errorf("%q has the variables %q, %v, want %q", text, got, err, want)
		}
	}
}

func TestUnknownVariables(t *testing.T) {
	got := unknownVariables(newRootCommand(), []string{
		"ECHOD_MAX_CONN=1", "ECHOD_LOGLEVEL=debug", "ECHOD_CTL_JSN=1", "ECHOD_GRACE=1s", "ECHOD_LOAD_CONNS=1", "ECHOD_PORT=tcp://10.0.0.1:1",
		"ECHOD_SERVICE_PORT_ECHO=1", "ECHOD_INTERNAL_LINK=3", "PATH=/bin", "ECHOD_CHECK=1",
	})
	want := []unknownVariable{
		{"ECHOD_CHECK", ""}, {"ECHOD_CTL_JSN", "ECHOD_CTL_JSON"}, {"ECHOD_LOGLEVEL", "ECHOD_LOG_LEVEL"}, {"ECHOD_MAX_CONN", "ECHOD_MAX_CONNS"},
	}
	for i, w := range want {
		if i >= len(got) || got[i].name != w.name || w.nearest != "" && got[i].nearest != w.nearest {
			t.Fatalf("unknown are %q, want %q", got, want)
		}
	}
	if len(got) != len(want) {
		t.Errorf("unknown are %q, want %q", got, want)
	}
}
