// Nbiotls is an echo server over TLS on github.com/lesismal/nbio, with its own copy of crypto/tls that does not block,
// set up as in its examples, with a poller per CPU. Its arguments are the address, and the files of the certificate and
// of its key.
package main

import (
	"fmt"
	"os"
	"runtime"

	"github.com/lesismal/llib/std/crypto/tls"
	"github.com/lesismal/nbio"
	ntls "github.com/lesismal/nbio/extension/tls"
	"github.com/lesismal/nbio/logging"
)

func main() {
	logging.SetLevel(logging.LevelError)
	cert, err := tls.LoadX509KeyPair(os.Args[2], os.Args[3])
	fail(err)
	engine := nbio.NewEngine(nbio.Config{
		Network: "tcp",
		Addrs:   []string{os.Args[1]},
		NPoller: runtime.GOMAXPROCS(0),
	})
	engine.OnOpen(ntls.WrapOpen(&tls.Config{Certificates: []tls.Certificate{cert}}, false, nil))
	engine.OnClose(ntls.WrapClose(func(_ *nbio.Conn, session *tls.Conn, _ error) { session.Close() }))
	engine.OnData(ntls.WrapData(func(_ *nbio.Conn, session *tls.Conn, data []byte) {
		_, _ = session.Write(data)
	}))
	fail(engine.Start())
	select {}
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
