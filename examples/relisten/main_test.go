package main

import (
	"bufio"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"

	"echod/server"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRelisten(t *testing.T) {
	dir := t.TempDir()
	path, socket := filepath.Join(dir, "addresses"), filepath.Join(dir, "socket")
	logger := zaptest.NewLogger(t)
	srv, err := server.New(server.Echo, server.Options{Logger: logger, Notifier: server.DefaultLineNotifier()})
	if err != nil {
		t.Fatal(err)
	}
	ls := &listeners{srv: srv, path: path, open: make(map[string]net.Listener)}
	reload := make(chan os.Signal)
	// apply has the file read. The second signal is taken when the first has been acted on.
	apply := func() {
		t.Helper()
		for range 2 {
			select {
			case reload <- syscall.SIGHUP:
			case <-srv.Done():
				t.Fatal("the server has stopped")
			}
		}
	}
	update := func(text string) {
		t.Helper()
		write(t, path, text)
		apply()
	}

	write(t, path, "127.0.0.1:0\n")
	ctx, signal := context.WithCancel(t.Context())
	defer signal()
	stopped := make(chan error, 1)
	go func() { stopped <- ls.serve(ctx, reload, logger) }()
	apply()
	tcp := ls.open["127.0.0.1:0"].Addr()
	old := dial(t, tcp)
	old.echo("one")

	t.Run("a mistake in the file changes nothing", func(t *testing.T) {
		for _, text := range []string{"", "127.0.0.1:0 nonsense"} {
			update(text)
			dial(t, tcp).echo("one")
		}
	})
	t.Run("a listener that is new is opened", func(t *testing.T) {
		update("127.0.0.1:0 unix://" + socket)
		dial(t, &net.UnixAddr{Net: "unix", Name: socket}).echo("one")
		dial(t, tcp).echo("one")
	})
	t.Run("a listener that is gone is closed, and its clients stay", func(t *testing.T) {
		update("unix://" + socket)
		for {
			nc, err := net.Dial(tcp.Network(), tcp.String())
			if err != nil {
				break
			}
			_ = nc.Close()
		}
		old.echo("two")
	})
	t.Run("a listener can come back", func(t *testing.T) {
		update("127.0.0.1:0 unix://" + socket)
		dial(t, ls.open["127.0.0.1:0"].Addr()).echo("one")
	})

	current := dial(t, &net.UnixAddr{Net: "unix", Name: socket})
	current.echo("one")
	signal()
	t.Run("a drain tells the clients of all listeners", func(t *testing.T) {
		for _, c := range []client{old, current} {
			c.expect("SHUTDOWN 5 shutdown\n")
			if err := c.Conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if rest, err := io.ReadAll(c.r); len(rest) > 0 || err != nil {
				t.Errorf("got %q, %v, want an end of stream", rest, err)
			}
		}
	})
	if err := <-stopped; err != nil {
		t.Errorf("serve: %v", err)
	}
}

func TestFileMissing(t *testing.T) {
	srv, err := server.New(server.Echo, server.Options{})
	if err != nil {
		t.Fatal(err)
	}
	ls := &listeners{srv: srv, path: filepath.Join(t.TempDir(), "none"), open: make(map[string]net.Listener)}
	err = ls.serve(t.Context(), nil, zaptest.NewLogger(t))
	if err == nil || !strings.Contains(err.Error(), "none") {
		t.Errorf("got %v, want an error that names the file", err)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

type client struct {
	t *testing.T
	net.Conn
	r *bufio.Reader
}

func dial(t *testing.T, addr net.Addr) client {
	t.Helper()
	nc, err := net.Dial(addr.Network(), addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	return client{t, nc, bufio.NewReader(nc)}
}

func (c client) echo(text string) {
	c.t.Helper()
	if _, err := io.WriteString(c, text+"\n"); err != nil {
		c.t.Fatal(err)
	}
	c.expect(text + "\n")
}

func (c client) expect(want string) {
	c.t.Helper()
	if got, err := c.r.ReadString('\n'); got != want {
		c.t.Fatalf("got %q (%v), want %q", got, err, want)
	}
}
