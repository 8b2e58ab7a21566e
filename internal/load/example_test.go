package load_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"time"

	"echod/internal/load"
)

func ExampleRun() {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	served := make(chan struct{})
	go func() { // a server for one client
		defer close(served)
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = io.Copy(conn, conn)
	}()
	defer func() { <-served }()
	defer ln.Close()

	report, err := load.Run(context.Background(), load.Options{
		Address: ln.Addr().String(),
		Stages:  []load.Stage{{Rate: 1000, Duration: 100 * time.Millisecond}},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(report.Echoes.Sent, "sent,", report.Echoes.Returned, "returned")
	fmt.Println("failures:", report.Failures(load.Limits{Lost: new(int64(0))}))
	// Output:
	// 100 sent, 100 returned
	// failures: []
}
