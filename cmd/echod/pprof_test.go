package main

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"
)

func TestProfiles(t *testing.T) {
	get := func(ctx context.Context, h http.Handler, path string) int {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(ctx, http.MethodGet, path, http.NoBody))
		return w.Code
	}
	t.Run("seconds are bounded", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			h := profiles()
			for query, want := range map[string]int{
				"": 200, "?seconds=1": 200, "?seconds=60": 200, "?seconds=61": 400, "?seconds=1e9": 400, "?seconds=-1": 400, "?seconds=NaN": 400, "?seconds=x": 400,
			} {
				if got := get(t.Context(), h, "/debug/pprof/goroutine"+query); got != want {
					t.Errorf("%s: status %d, want %d", query, got, want)
				}
			}
		})
	})
	t.Run("one is made at a time", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			h := profiles()
			first := make(chan int)
			go func() { first <- get(t.Context(), h, "/debug/pprof/goroutine?seconds=30") }()
			time.Sleep(time.Second)
			if got := get(t.Context(), h, "/debug/pprof/heap"); got != http.StatusServiceUnavailable {
				t.Errorf("during a profile: status %d, want 503", got)
			}
			if got := <-first; got != http.StatusOK {
				t.Errorf("the first: status %d, want 200", got)
			}
			if got := get(t.Context(), h, "/debug/pprof/heap"); got != http.StatusOK {
				t.Errorf("after it: status %d, want 200", got)
			}
		})
	})
}
