package main

import (
	"fmt"
	"net/http"
	"net/http/pprof"
	"strconv"
)

// maxProfile bounds the seconds of a profile, because every client of --http can request one.
const maxProfile = 60

// profiles returns the handler of /debug/pprof/. It makes one profile at a time, to bound the load.
func profiles() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	free := make(chan struct{}, 1)
	free <- struct{}{}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if text := r.FormValue("seconds"); text != "" {
			if seconds, err := strconv.ParseFloat(text, 64); err != nil || !(seconds >= 0 && seconds <= maxProfile) {
				http.Error(w, fmt.Sprintf("seconds must be a number of at most %d", maxProfile), http.StatusBadRequest)
				return
			}
		}
		select {
		case <-free:
			defer func() { free <- struct{}{} }()
			mux.ServeHTTP(w, r)
		default:
			w.Header().Set("Retry-After", "1")
			http.Error(w, "another profile is being made", http.StatusServiceUnavailable)
		}
	})
}
