package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

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
		t.Errorf("%s %s answers %d, which is not in the document: %v", in.Request.Method, in.Request.URL, got.status, err)
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
		t.Errorf("%s is not a %s: %v", line, name, err)
	}
}

func TestDocument(t *testing.T) {
	t.Run("has exactly the routes of the plane", testDocumentRoutes)
	t.Run("names all states, reasons, modes, phases and problems", testDocumentEnums)
	t.Run("allows no unknown properties", testDocumentClosed)
	t.Run("matches every answer, and every answer in it is given", testDocumentAnswers)
	t.Run("has the end of the drain delay", testDocumentDrain)
	t.Run("has the event for missed events", testDocumentMissed)
	t.Run("has labels, the handler's error, and who released a hold", testDocumentLabels)
}

func testDocumentRoutes(t *testing.T) {
	doc := loadDocument(t)
	var documented, served []string
	for path, item := range doc.Paths.Map() {
		for method := range item.Operations() {
			documented = append(documented, method+" "+path)
		}
	}
	for _, route := range New(nil, Options{Metrics: http.NotFoundHandler(), Upgrade: (&rig{}).upgrade}).routes {
		served = append(served, route.method+" "+route.pattern)
	}
	slices.Sort(documented)
	slices.Sort(served)
	wantEqual(t, "routes in the document", documented, served)
}

func testDocumentEnums(t *testing.T) {
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
		ProblemNotDraining, ProblemHolds,
		ProblemUpgrade, ProblemUpgrading, ProblemUpgraded, ProblemCertificate,
	}
	slices.Sort(want)
	wantEqual(t, "types of problems", problems, want)
}

func testDocumentClosed(t *testing.T) {
	doc := loadDocument(t)
	objects := 0
	for name, schema := range doc.Components.Schemas {
		if s := schema.Value; s.Type.Is("object") {
			objects++
			if name != "Labels" && (s.AdditionalProperties.Has == nil || *s.AdditionalProperties.Has) {
				t.Errorf("%s allows unknown properties", name)
			}
		}
	}
	if objects < 20 {
		t.Errorf("the document has only %d objects", objects)
	}
}

// exchange is a request and the status of its answer.
type exchange struct {
	method, target, body string
	status               int
}

// drive makes requests, checks each and its answer against the document, and adds the answers to seen. The document
// must not allow a request that is answered 400, unless it is in lax.
func (d document) drive(t *testing.T, r *rig, seen map[string]bool, exchanges []exchange) {
	t.Helper()
	for _, e := range exchanges {
		what := e.method + " " + e.target + " " + e.body
		got := r.do(t, e.method, e.target, e.body)
		if got.status != e.status {
			t.Errorf("%.80s: answered %d: %s: want %d", what, got.status, got.body, e.status)
			continue
		}
		in, err := d.request(e.method, e.target, e.body)
		switch {
		case got.status == http.StatusNotFound && in == nil:
			d.wantSchema(t, "NotFoundProblem", []byte(got.body))
			continue
		case got.status == http.StatusMethodNotAllowed:
			d.wantSchema(t, "MethodProblem", []byte(got.body))
			continue
		case in == nil:
			t.Errorf("%.80s: not in the document: %v", what, err)
			continue
		case err != nil && got.status < 300:
			t.Errorf("%.80s: answered %d, and the document does not allow the request: %v", what, got.status, err)
		case err == nil && got.status == http.StatusBadRequest && !slices.Contains(lax, e.target+" "+e.body):
			t.Errorf("%.80s: answered %d, and the document allows the request", what, got.status)
		}
		d.wantAnswer(t, in, got)
		seen[in.Route.Method+" "+in.Route.Path+" "+strconv.Itoa(got.status)] = true
	}
}

// lax are bad requests that the document cannot tell from good ones.
var lax = []string{
	"/v1/conns?all=true&min_idle=1s ", "/v1/conns ", "/v1/conns?all=false ",
	`/v1/pause {"ttl":"0s"}`, `/v1/upgrade {"timeout":"0s"}`, `/v1/pause {"reason":"x","reason":"x"}`,
	`/v1/shutdown {"now":true,"grace":"5s"}`, `/v1/shutdown {"extend":"0s"}`, `/v1/shutdown {"extend":"5s","grace":"5s"}`,
	`/v1/pause {"spread":"1s"}`, "/v1/wait ", "/v1/conns?limit=1&limit=1 ",
	`/v1/pause {"reason":"x"} {}`,
	"/v1/conns?cursor=x ", "/v1/conns?cursor=1 ", "/v1/conns?sort=idle&cursor=" + listPosition{"in", 1, 1}.cursor() + " ",
	"/v1/conns?remote=x ",
	`/v1/settings {"max-conns":"many"}`, `/v1/settings {"deny":{"remove":["198.51.100.1"]}}`,
}

// someCertificates is one certificate, which reloads with an error.
type someCertificates struct{ err error }

func (someCertificates) Infos() []server.CertificateInfo {
	return []server.CertificateInfo{{CertFile: "cert.pem", Subject: "CN=echo", Names: []string{"echo.example"}}}
}

func (c someCertificates) Reload() (bool, error) { return c.err == nil, c.err }

// testDocumentAnswers makes every operation give every answer in the document.
func testDocumentAnswers(t *testing.T) {
	doc := loadDocument(t)
	r := newRig(t, server.Options{Drain: server.DrainOptions{Grace: time.Hour, Delay: time.Hour}})
	seen := map[string]bool{}
	const get, post, del, put, patch = http.MethodGet, http.MethodPost, http.MethodDelete, http.MethodPut, http.MethodPatch
	huge := `{"reason":"` + strings.Repeat("x", maxBody) + `"}`
	hugeText := strings.Replace(huge, "reason", "text", 1)

	for range 4 {
		r.echoClient(t)
	}
	doc.drive(t, r, seen, []exchange{
		{get, "/v1/status", "", 200},
		{get, "/v1/status?x=1", "", 400},
		{put, "/v1/status", "", 405},
		{get, "/v1/stat", "", 404},
		{get, "/metrics", "", 200},
		{post, "/metrics", "", 405},

		{get, "/v1/conns", "", 200},
		{get, "/v1/conns?limit=1&min_idle=0s", "", 200},
		{get, "/v1/conns?limit=-1", "", 400},
		{get, "/v1/conns?limit=1.5", "", 400},
		{get, "/v1/conns?limit=1&limit=1", "", 400},
		{get, "/v1/conns?min_idle=soon", "", 400},
		{get, "/v1/conns?min_idle=-1s", "", 400},
		{get, "/v1/conns?sort=idle&limit=2&remote=unix,10.0.0.0/8", "", 200},
		{get, "/v1/conns?sort=out&limit=2", "", 200},
		{get, "/v1/conns?limit=2", "", 200},
		{get, "/v1/conns?sort=name", "", 400},
		{get, "/v1/conns?cursor=x", "", 400},
		{get, "/v1/conns?cursor=1", "", 400},
		{get, "/v1/conns?sort=idle&cursor=" + listPosition{"in", 1, 1}.cursor(), "", 400},
		{get, "/v1/conns?remote=x", "", 400},
		{get, "/v1/clients", "", 200},
		{get, "/v1/clients?limit=0&min_idle=1s&identity=x&remote=192.0.2.1", "", 200},
		{get, "/v1/clients?limit=-1", "", 400},
		{post, "/v1/clients", "", 405},
		{del, "/v1/conns?remote=192.0.2.0/24", "", 200},
		{post, "/v1/conns", "", 405},
		{del, "/v1/conns/1", "", 200},
		{del, "/v1/conns/9999", "", 404},
		{del, "/v1/conns/-1", "", 400},
		{del, "/v1/conns/x", "", 400},
		{get, "/v1/conns/1", "", 405},
		{del, "/v1/conns", "", 400},
		{del, "/v1/conns?all=false", "", 400},
		{del, "/v1/conns?all=yes", "", 400},
		{del, "/v1/conns?all=true&min_idle=1s", "", 400},
		{del, "/v1/conns?min_idle=1h", "", 200},
		{del, "/v1/conns?all=true", "", 200},
	})
	r.awaitConns(t, 0)
	r.echoClient(t)
	doc.drive(t, r, seen, []exchange{
		{get, "/v1/conns/closed", "", 200},
		{get, "/v1/conns/closed?limit=2", "", 200},
		{get, "/v1/conns/closed?limit=all", "", 400},
		{get, "/v1/status", "", 200},

		{get, "/v1/settings", "", 200},
		{get, "/v1/settings?x=1", "", 400},
		{patch, "/v1/settings", `{"max-conns":50,"grace":"1h","deny":["192.0.2.0/24"]}`, 200},
		{patch, "/v1/settings", `{"max-conns":"50","deny":{"add":["192.0.2.1"],"remove":["192.0.2.0/24"]}}`, 200},
		{patch, "/v1/settings", `{"max-conns":50}`, 200},
		{get, "/v1/settings", "", 200},
		{get, "/v1/status", "", 200},
		{patch, "/v1/settings", `{"max-conns":"many"}`, 400},
		{patch, "/v1/settings", `{"max-conns":true}`, 400},
		{patch, "/v1/settings", `{"max-conns":{"add":["1"]}}`, 400},
		{patch, "/v1/settings", `{"deny":{"remove":["198.51.100.1"]}}`, 400},
		{patch, "/v1/settings", `{"deny":{"insert":[]}}`, 400},
		{patch, "/v1/settings", `{"deny":[1]}`, 400},
		{patch, "/v1/settings", `{"listen":"x"}`, 400},
		{patch, "/v1/settings", `{}`, 400},
		{patch, "/v1/settings", strings.Replace(huge, "reason", "allow", 1), 413},
		{post, "/v1/settings", `{}`, 405},

		{post, "/v1/notify", `{"text":"back at noon"}`, 200},
		{post, "/v1/notify", `{"text":""}`, 400},
		{post, "/v1/notify", `{"text":"two\nlines"}`, 400},
		{post, "/v1/notify", `{}`, 400},
		{post, "/v1/notify", ``, 400},
		{post, "/v1/notify", hugeText, 413},

		{post, "/v1/pause", ``, 201},
		{post, "/v1/pause", `{}`, 201},
		{post, "/v1/pause", `{"reason":"bäckup","ttl":"1h30m","mode":"reject"}`, 201},
		{get, "/v1/status", "", 200},
		{get, "/v1/wait?state=paused", "", 200},
		{get, "/v1/wait?state=paused&connections=1&timeout=1m", "", 200},
		{get, "/v1/wait?connections=7&timeout=0s", "", 408},
		{get, "/v1/wait", "", 400},
		{get, "/v1/wait?state=asleep", "", 400},
		{get, "/v1/wait?connections=-1", "", 400},
		{get, "/v1/wait?state=paused&timeout=5", "", 400},
		{post, "/v1/pause", `{"ttl":"0s"}`, 400},
		{post, "/v1/pause", `{"ttl":"-5s"}`, 400},
		{post, "/v1/pause", `{"ttl":5}`, 400},
		{post, "/v1/pause", `{"ttl":null}`, 400},
		{post, "/v1/pause", `{"mode":"halt"}`, 400},
		{post, "/v1/pause", `{"tll":"5s"}`, 400},
		{post, "/v1/pause", `{"reason":"x","reason":"x"}`, 400},
		{post, "/v1/pause", `{"reason":"x"`, 400},
		{post, "/v1/pause", `{"reason":"x"} {}`, 400},
		{post, "/v1/pause", `["reason"]`, 400},
		{post, "/v1/pause?while=idle", ``, 400},
		{post, "/v1/pause", huge, 413},
		{del, "/v1/holds/h1", "", 200},
		{del, "/v1/holds/h1", "", 404},
		{del, "/v1/holds/h2?now=true", "", 400},
		{post, "/v1/resume", ``, 409},
		{post, "/v1/resume", `{}`, 409},
		{post, "/v1/resume", `{"all":true}`, 200},
		{post, "/v1/resume", `{"every":true}`, 400},
		{post, "/v1/pause", `{"spread":"1s"}`, 400},
		{post, "/v1/pause", `{"evict":true,"spread":"1h"}`, 201},
		{get, "/v1/conns", "", 200},
		{post, "/v1/resume", ``, 200},
		{post, "/v1/resume", huge, 413},
		{get, "/v1/events?type=state", "", 400},

		{post, "/v1/upgrade", ``, 200},
		{post, "/v1/upgrade", `{"timeout":"30s"}`, 200},
		{post, "/v1/upgrade", `{"timeout":"1ms"}`, 500},
		{post, "/v1/upgrade", `{"timeout":"2ms"}`, 409},
		{post, "/v1/upgrade", `{"timeout":"0s"}`, 400},
		{post, "/v1/upgrade?now=true", ``, 400},
		{post, "/v1/upgrade", huge, 413},

		{post, "/v1/shutdown", `{"now":true,"grace":"5s"}`, 400},
		{post, "/v1/shutdown", `{"now":"yes"}`, 400},
		{post, "/v1/shutdown", `{"extend":"0s"}`, 400},
		{post, "/v1/shutdown", `{"extend":"5s","grace":"5s"}`, 400},
		{post, "/v1/shutdown", `{"extend":"5s"}`, 409},
		{del, "/v1/shutdown?now=true", "", 400},
		{del, "/v1/shutdown", huge, 413},
		{del, "/v1/shutdown", "", 409},
		{post, "/v1/shutdown", huge, 413},
		{post, "/v1/shutdown", `{"predecessor":true}`, 404},
	})

	doc.drive(t, r, seen, []exchange{{post, "/v1/certificates/reload", "", 404}})
	r.plane.certificates = someCertificates{}
	doc.drive(t, r, seen, []exchange{
		{get, "/v1/status", "", 200},
		{post, "/v1/certificates/reload", "", 200},
		{post, "/v1/certificates/reload?now=true", "", 400},
		{post, "/v1/certificates/reload", huge, 413},
	})
	r.plane.certificates = someCertificates{errors.New("no such file")}
	doc.drive(t, r, seen, []exchange{{post, "/v1/certificates/reload", "", 422}})

	doc.driveBusy(t, r, seen)
	streams := doc.followStreams(t, r, seen)
	doc.drive(t, r, seen, []exchange{
		{post, "/v1/shutdown", `{"grace":"1h","spread":"1m","reason":"upgrade"}`, 202},
		{del, "/v1/shutdown", "", 200},
		{post, "/v1/shutdown", `{"grace":"1h","reason":"upgrade"}`, 202},
		{post, "/v1/shutdown", `{"extend":"1m"}`, 202},
		{post, "/v1/shutdown", ``, 200},
		{post, "/v1/shutdown", `{"grace":"30m"}`, 202},
		{get, "/v1/status", "", 200},
		{post, "/v1/pause", "", 409},
		{post, "/v1/resume", "", 409},
		{post, "/v1/upgrade", "", 409},
		{del, "/v1/holds/h2", "", 409},
		{get, "/v1/wait?state=running", "", 409},
		{get, "/v1/wait?state=draining", "", 200},
		{post, "/v1/notify", `{"text":"goodbye"}`, 200},
		{post, "/v1/shutdown", `{"now":true,"grace":"0s"}`, 202},
	})
	streams()
	<-r.ended

	for path, item := range doc.Paths.Map() {
		for method, operation := range item.Operations() {
			for status := range operation.Responses.Map() {
				if !seen[method+" "+path+" "+status] {
					t.Errorf("%s %s: no request was answered %s, which is in the document", method, path, status)
				}
			}
		}
	}
}

// driveBusy drives the answers that are given when too many requests last.
func (d document) driveBusy(t *testing.T, r *rig, seen map[string]bool) {
	t.Helper()
	var conns []net.Conn
	last := func(request string, total int) {
		conn := r.rawConn(t)
		conns = append(conns, conn)
		ask(t, conn, request+" HTTP/1.1\r\nHost: echod\r\nContent-Length: 0\r\n\r\n")
		r.awaitStreams(t, total)
	}
	for n := range MaxCallers / 3 {
		last("POST /v1/pause?while=connected", n+1)
	}
	d.drive(t, r, seen, []exchange{{http.MethodPost, "/v1/pause?while=connected", "", http.StatusServiceUnavailable}})
	for _, conn := range conns {
		_ = conn.Close()
	}
	r.awaitStreams(t, 0)

	conns = nil
	var driving sync.WaitGroup
	driving.Go(func() {
		d.drive(t, r, seen, []exchange{{http.MethodGet, "/v1/wait?connections=77", "", http.StatusServiceUnavailable}})
	})
	r.awaitStreams(t, 1)
	for n := range MaxCallers * 2 / 3 {
		last("GET /v1/events", min(n+2, MaxCallers*2/3))
	}
	driving.Wait()
	for _, conn := range conns {
		_ = conn.Close()
	}
	r.awaitStreams(t, 0)
}

// followStreams opens both kinds of streams and makes every kind of event happen. Once the server has stopped, check
// checks each line against the document.
func (d document) followStreams(t *testing.T, r *rig, seen map[string]bool) (check func()) {
	t.Helper()
	events := d.openStream(t, r, http.MethodGet, "/v1/events", http.StatusOK)
	pause := d.openStream(t, r, http.MethodPost, "/v1/pause?while=connected", http.StatusCreated)
	hold := pause()
	d.wantSchema(t, "Hold", hold)
	d.wantSchema(t, "PauseLine", hold)
	must[SettingsChanged](t)(r.client.ChangeSettings(t.Context(), map[string]any{"max-conns-per-ip": "100"}))
	must[Change](t)(r.client.Resume(t.Context()))
	released := pause()
	d.wantSchema(t, "Released", released)
	d.wantSchema(t, "PauseLine", released)
	if line := pause(); line != nil {
		t.Errorf("another line after the last one: %s", line)
	}
	_ = r.echoClient(t).Close()
	r.awaitConns(t, 1)
	seen["GET /v1/events 200"] = true

	return func() {
		kinds := map[string]bool{}
		for line := events(); line != nil; line = events() {
			d.wantSchema(t, "Event", line)
			for _, kind := range []string{"state", "opened", "closed", "hold", "released", "settings"} {
				if strings.Contains(string(line), `"type":"`+kind+`"`) {
					kinds[kind] = true
				}
			}
		}
		wantEqual(t, "kinds of events that were seen", kinds, map[string]bool{"state": true, "opened": true, "closed": true, "hold": true, "released": true, "settings": true})
	}
}

// openStream makes a request that lasts. next returns its next line, and nil at the end.
func (d document) openStream(t *testing.T, r *rig, method, target string, status int) (next func() []byte) {
	t.Helper()
	if _, err := d.request(method, target, ""); err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(context.Background(), method, "http://echod"+target, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := r.client.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = resp.Body.Close() })
	wantEqual(t, target+": status", resp.StatusCode, status)
	wantEqual(t, target+": type", resp.Header.Get("Content-Type"), "application/jsonl")
	lines := bufio.NewReader(resp.Body)
	return func() []byte {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return nil
		}
		return line
	}
}

func testDocumentDrain(t *testing.T) {
	doc := loadDocument(t)
	began := time.Now()
	for name, until := range map[string]time.Time{"with a delay": began.Add(3 * time.Second), "without": began} {
		got := wireDrain(&server.DrainInfo{Since: began, AcceptUntil: until, Deadline: began.Add(time.Minute), Reason: "x"})
		wantEqual(t, name+": accepting_until", got.AcceptingUntil != nil, until.After(began))
		line, err := json.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		doc.wantSchema(t, "Drain", line)
	}
}

func testDocumentMissed(t *testing.T) {
	line, err := json.Marshal(wireEvent(server.Event{ID: 1, Time: time.Now(), Type: server.EventMissed, Missed: 3}))
	if err != nil {
		t.Fatal(err)
	}
	loadDocument(t).wantSchema(t, "Event", line)
}

func testDocumentLabels(t *testing.T) {
	doc := loadDocument(t)
	labels := map[string]string{"user": "alice"}
	addr := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}
	open := wireConn(server.ConnInfo{ID: 1, Remote: addr, Local: addr, Phase: server.PhaseServing, Labels: labels})
	closed := wireClosed(server.ClosedConn{ID: 1, Remote: addr, Local: addr, Labels: labels, Reason: server.ReasonHandlerError, Err: errors.New("no such user")})
	released := wireEvent(server.Event{ID: 1, Type: server.EventHoldReleased, Hold: &server.HoldInfo{ID: "h1"}, Cause: "x", By: server.Caller{UID: 1, PID: 2}})
	for name, v := range map[string]any{"Connection": open, "ClosedConnection": closed, "ReleasedEvent": released} {
		line, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		doc.wantSchema(t, name, line)
	}
	wantEqual(t, "labels of an open connection", open.Labels, labels)
	wantEqual(t, "labels of a closed connection", closed.Labels, labels)
	wantEqual(t, "error of its handler", closed.Error, "no such user")
	wantEqual(t, "who released the hold", released.ReleasedBy, &Caller{UID: 1, PID: 2})
}

// TestStrictness sends to every route in the table a parameter, a body, and a method, that it does not have.
func TestStrictness(t *testing.T) {
	r := newRig(t, server.Options{})
	allowed := make(map[string][]string)
	for _, route := range r.plane.routes {
		allowed[route.pattern] = append(allowed[route.pattern], route.method)
	}
	for pattern, methods := range allowed {
		if slices.Contains(methods, http.MethodGet) && !isLongLived(pattern) {
			methods = append(methods, http.MethodHead)
		}
		slices.Sort(methods)
		for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions} {
			if slices.Contains(methods, method) {
				continue
			}
			got := r.do(t, method, strings.ReplaceAll(pattern, "{id}", "h1"), "")
			wantEqual(t, method+" "+pattern+": status", got.status, http.StatusMethodNotAllowed)
			wantEqual(t, method+" "+pattern+": Allow", got.header.Get("Allow"), strings.Join(methods, ", "))
		}
	}
	for _, route := range r.plane.routes {
		if route.pattern == "/metrics" {
			continue // its handler is not ours
		}
		target := strings.ReplaceAll(route.pattern, "{id}", "h1")
		for _, query := range []string{"grace=1m", "now=true", "no_such_parameter=1", "%zz"} {
			got := r.do(t, route.method, target+"?"+query, "")
			what := route.method + " " + target + "?" + query
			wantEqual(t, what+": status", got.status, http.StatusBadRequest)
			wantEqual(t, what+": problem", strings.Contains(got.body, ProblemInvalid), true)
		}
		if route.method == http.MethodPost {
			got := r.do(t, route.method, target, `{"no_such_field":1}`)
			wantEqual(t, route.method+" "+target+": status with an unknown field", got.status, http.StatusBadRequest)
		}
	}
	st := r.srv.Status()
	wantEqual(t, "state", st.State, server.StateRunning)
	wantEqual(t, "holds", len(st.Holds), 0)
}
