package control

import (
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/legacy"

	"echod/server"
)

// document is openapi.yaml.
type document struct {
	*openapi3.T
	router routers.Router
}

func loadDocument(t *testing.T) document {
	t.Helper()
	doc, err := openapi3.NewLoader().LoadFromFile("openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	router, err := legacy.NewRouter(doc, openapi3.EnableExamplesValidation())
	if err != nil {
		t.Fatal(err)
	}
	return document{doc, router}
}

// request checks a request against the document, and returns what is needed to check its answer.
func (d document) request(method, target, body string) (*openapi3filter.RequestValidationInput, error) {
	req, err := http.NewRequestWithContext(context.Background(), method, "http://echod"+target, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	route, params, err := d.router.FindRoute(req)
	if err != nil {
		return nil, err
	}
	in := &openapi3filter.RequestValidationInput{
		Request: req, PathParams: params, Route: route,
		Options: &openapi3filter.Options{IncludeResponseStatus: true},
	}
	for name := range in.GetQueryParams() {
		known := slices.ContainsFunc(route.Operation.Parameters, func(p *openapi3.ParameterRef) bool { return p.Value.In == "query" && p.Value.Name == name })
		if !known {
			return in, &url.Error{Op: "parameter", URL: name, Err: openapi3filter.ErrInvalidRequired}
		}
	}
	return in, openapi3filter.ValidateRequest(context.Background(), in)
}

// wantAnswer checks an answer against the document.
func (d document) wantAnswer(t *testing.T, in *openapi3filter.RequestValidationInput, got answered) {
	t.Helper()
	out := &openapi3filter.ResponseValidationInput{
		RequestValidationInput: in, Status: got.status, Header: got.header, Options: in.Options,
	}
	out.SetBodyBytes([]byte(got.body))
	if err := openapi3filter.ValidateResponse(context.Background(), out); err != nil {
		t.Errorf("%s %s answers %d, which the document does not allow: %v", in.Request.Method, in.Request.URL, got.status, err)
	}
}

// wantSchema checks JSON against a component of the document.
func (d document) wantSchema(t *testing.T, name string, line []byte) {
	t.Helper()
	schema, ok := d.Components.Schemas[name]
	if !ok {
		t.Fatalf("the document has no schema %s", name)
	}
	var v any
	if err := json.Unmarshal(line, &v); err != nil {
		t.Fatalf("%s: %v", line, err)
	}
	if err := schema.Value.VisitJSON(v, openapi3.EnableFormatValidation()); err != nil {
		t.Errorf("%s is no %s: %v", line, name, err)
	}
}

func TestDocumentHasExactlyTheRoutesThereAre(t *testing.T) {
	doc := loadDocument(t)
	var documented, served []string
	for path, item := range doc.Paths.Map() {
		for method := range item.Operations() {
			documented = append(documented, method+" "+path)
		}
	}
	for _, route := range New(nil, Options{Metrics: http.NotFoundHandler()}).routes {
		served = append(served, route.method+" "+route.pattern)
	}
	slices.Sort(documented)
	slices.Sort(served)
	wantEqual(t, "routes in the document", documented, served)
}

func TestDocumentNamesAllThatCanBe(t *testing.T) {
	doc := loadDocument(t)
	enum := func(name string) (values []string) {
		for _, v := range doc.Components.Schemas[name].Value.Enum {
			values = append(values, v.(string))
		}
		return values
	}
	var reasons, states, modes, phases []string
	for _, r := range server.Reasons() {
		reasons = append(reasons, r.String())
	}
	for s := server.StateStarting; s <= server.StateStopped; s++ {
		states = append(states, s.String())
	}
	for m := server.PauseQueue; m <= server.PauseReject; m++ {
		modes = append(modes, m.String())
	}
	for p := server.PhaseWaiting; p <= server.PhaseClosing; p++ {
		phases = append(phases, p.String())
	}
	wantEqual(t, "reasons", enum("Reason"), reasons)
	wantEqual(t, "states", enum("State"), states)
	wantEqual(t, "modes", enum("Mode"), modes)
	slices.Sort(phases)
	wantEqual(t, "phases", slices.Sorted(maps.Keys(doc.Components.Schemas["Phases"].Value.Properties)), phases)
	slices.Sort(reasons)
	wantEqual(t, "reasons that are counted", slices.Sorted(maps.Keys(doc.Components.Schemas["Closed"].Value.Properties)), reasons)

	var problems []string
	for name, schema := range doc.Components.Schemas {
		if strings.HasSuffix(name, "Problem") {
			problems = append(problems, schema.Value.Properties["type"].Value.Enum[0].(string))
		}
	}
	slices.Sort(problems)
	want := []string{
		ProblemInvalid, ProblemNotFound, ProblemMethod, ProblemTimeout, ProblemDraining, ProblemTooLarge, ProblemBusy, ProblemUnexpected,
	}
	slices.Sort(want)
	wantEqual(t, "types of problems", problems, want)
}

func TestDocumentLeavesNoObjectOpen(t *testing.T) {
	doc := loadDocument(t)
	objects := 0
	for name, schema := range doc.Components.Schemas {
		if s := schema.Value; s.Type.Is("object") {
			objects++
			if s.AdditionalProperties.Has == nil || *s.AdditionalProperties.Has {
				t.Errorf("%s allows further properties: drift would not show", name)
			}
		}
	}
	if objects < 20 {
		t.Errorf("the document has %d objects: this test looks in the wrong place", objects)
	}
}
