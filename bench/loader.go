package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"

	"echod/bench/load"
)

// The load runs in a process of its own: this command, started with loadCommand and a job as its arguments,
// which prints what came of it.
const loadCommand = "load"

// job says what the load is to do.
type job string

const (
	jobRun     job = "run"     // put load on the server, print a load.Result
	jobHold    job = "hold"    // open connections, print null, hold them until the input ends
	jobDrain   job = "drain"   // open connections, end the server, print a load.Drained
	jobDisturb job = "disturb" // print null, make a disturbance once a second until the input ends, print how often
)

// loadMain is what the process of a load does.
func loadMain(args []string, in io.Reader, out io.Writer) error {
	if len(args) != 2 {
		return errors.New("want a job and its spec")
	}
	answer := json.NewEncoder(out)
	if job(args[0]) == jobDisturb {
		var d disturbance
		if err := json.Unmarshal([]byte(args[1]), &d); err != nil {
			return fmt.Errorf("reading the disturbance: %w", err)
		}
		times, err := d.keep(ended(in))
		if err != nil {
			return err
		}
		return answer.Encode(times)
	}
	var spec load.Spec
	if err := json.Unmarshal([]byte(args[1]), &spec); err != nil {
		return fmt.Errorf("reading the spec: %w", err)
	}
	if job(args[0]) == jobRun {
		result, err := load.Run(spec)
		if err != nil {
			return err
		}
		return answer.Encode(result)
	}
	held, err := load.Hold(spec)
	if err != nil {
		return err
	}
	defer held.Close()
	if job(args[0]) == jobHold {
		if err := answer.Encode(nil); err != nil {
			return err
		}
		return held.ReadUntil(ended(in))
	}
	drained, err := held.Drain()
	if err != nil {
		return err
	}
	return answer.Encode(drained)
}

// ended returns a channel that is closed when the input ends. Its goroutine ends with that, or with the process.
func ended(in io.Reader) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(io.Discard, in)
	}()
	return done
}

// A loader is a load under way.
type loader struct {
	cmd    *exec.Cmd
	hangUp io.Closer // its input: it ends when that ends
	out    *json.Decoder
	said   bytes.Buffer // to stderr
}

// startLoad starts the process of a load.
func startLoad(ctx context.Context, j job, spec any, on cpus) (*loader, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	l := &loader{cmd: exec.CommandContext(ctx, self, loadCommand, string(j), string(text))}
	l.cmd.SysProcAttr = dieWithParent()
	in, err := l.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	l.hangUp = in
	out, err := l.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	l.out = json.NewDecoder(out)
	l.cmd.Stderr = &l.said
	if err := on.run(l.cmd.Start); err != nil {
		return nil, fmt.Errorf("starting the load: %w", err)
	}
	return l, nil
}

// answer waits for what the load prints.
func (l *loader) answer(into any) error {
	err := l.out.Decode(into)
	if err == nil {
		return nil
	}
	if failed := l.end(); failed != nil {
		return failed // says why there is no answer
	}
	return fmt.Errorf("reading the load's answer: %w", err)
}

// end lets go of what the load holds, and waits for its end.
func (l *loader) end() error {
	_ = l.hangUp.Close()
	if err := l.cmd.Wait(); err != nil {
		return fmt.Errorf("the load: %w: %s", err, bytes.TrimSpace(l.said.Bytes()))
	}
	return nil
}

// measure runs one load against a server and returns its result.
func measure(ctx context.Context, p *process, s shape, length time.Duration, on cpus) (r load.Result, err error) {
	l, err := startLoad(ctx, jobRun, s.spec(p, length), on)
	if err != nil {
		return r, err
	}
	if err := l.answer(&r); err != nil {
		return r, err
	}
	return r, l.end()
}
