package server

import "testing"

func init() {
	paths = append(paths, path{"TCP that does not tell what is left", func(t *testing.T, h Handler) (*Server, func() stream) {
		believed := queueReportWorks
		queueReportWorks = func() bool { return false }
		t.Cleanup(func() { queueReportWorks = believed }) // after the server, which is closed by a cleanup that comes later
		return paths[0].serve(t, h)
	}})
}
