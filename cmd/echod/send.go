package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"echod/client"
	"echod/internal/bulk"
	"echod/internal/records"
)

func newSendCommand() *cobra.Command {
	var s sender
	cmd := &cobra.Command{
		Use:   "send [TEXT... | --lines|--csv|--raw [FILE|URL|-]...]",
		Short: "Send text, files, URLs or standard input, and write what comes back",
		Long: `Send text, files, URLs or standard input, and write what comes back.

With TEXT it sends that, as a line. Without, it sends standard input line by line.
With --lines, --csv or --raw the arguments are files, http:// and https:// URLs, or -
for standard input; gzip and zstd are unpacked on the way. They are streamed, however
long they are, over --conns connections at a time, and each echo is compared with
what was sent. A row of CSV is sent as a line of JSON with its line number.

The server's notices are said on stderr and never mixed up with the echo. When the
server announces its end, what is under way is finished; with --reconnect, which
files and URLs imply, what has not come back is sent again once the server, or its
successor, is back, and each record is written once.

The first SIGINT, SIGTERM or SIGHUP stops reading and finishes what is in flight, the
second ends it. With --resume, the same command goes on from there, also after SIGKILL
or a full disk: what --output and --failed had got beyond that is cut off.

Exit codes: 0 everything came back, 1 something did not, 2 usage, 128+signal.`,
		Example: `  echod send hello
  echod send < file | cmp - file
  echod send --csv --conns 16 --ordered --output echo.jsonl people.csv.gz
  echod send --lines --failed again.txt --resume state.json *.log`,
		RunE: func(cmd *cobra.Command, args []string) error {
			s.in, s.out, s.err = cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()
			s.changed = cmd.Flags().Changed
			return s.run(cmd.Context(), args)
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&s.address, "address", "127.0.0.1:9999", "server's `address`")
	flags.DurationVar(&s.timeout, "timeout", 10*time.Second, "`time` for connecting, and for TEXT to come back;\n0 is for ever")
	flags.BoolVar(&s.reconnect, "reconnect", false, "connect again, with growing pauses, when the server goes or is full")
	flags.DurationVar(&s.giveUp, "give-up", time.Minute, "with --reconnect: `time` without any echo after which it is\ngiven up; 0 is never")
	flags.BoolVar(&s.lines, "lines", false, "send files and URLs line by line")
	flags.BoolVar(&s.csv, "csv", false, "send files and URLs of CSV row by row, as JSON; the first row\nnames the columns")
	flags.BoolVar(&s.raw, "raw", false, "send files and URLs in blocks, whatever is in them")
	flags.BoolVar(&s.noHeader, "no-header", false, "CSV: the first row is data")
	flags.StringVar(&s.delimiter, "delimiter", ",", "CSV: `character` between fields, such as ; or \\t")
	flags.BoolVar(&s.lazyQuotes, "lazy-quotes", false, "CSV: quotes may stand within fields")
	flags.StringVar(&s.blockSize, "block-size", "32KiB", "raw: `size` of a block, up to 16MiB; some 15 of them are in\nmemory")
	flags.StringVar(&s.maxRecord, "max-record", "1MiB", "`size` of the longest line or row, up to 16MiB; several as long\nmay be in memory for each connection")
	flags.BoolVar(&s.verbatim, "verbatim", false, "do not unpack gzip and zstd")
	flags.IntVar(&s.conns, "conns", 1, "`number` of connections; with several, records come back in\nany order")
	flags.IntVar(&s.inFlight, "in-flight", 0, "`number` of records sent and not written yet, over all\nconnections (default: 64 for each); they are kept in memory,\nup to 4 MiB of them")
	flags.BoolVar(&s.ordered, "ordered", false, "write records in the order in which they were read")
	flags.Float64Var(&s.rate, "rate", 0, "most `records` in a second; 0 is as many as the server takes")
	flags.BoolVar(&s.strict, "strict", false, "stop at the first malformed record")
	flags.StringVar(&s.output, "output", "", "`file` for what comes back (default: standard output)")
	flags.StringVar(&s.failed, "failed", "", "`file` for records that did not come back, to be sent again;\nrows of CSV are written anew")
	flags.StringVar(&s.resume, "resume", "", "`file` that says where to go on, removed once all was sent")
	flags.BoolVar(&s.quiet, "quiet", false, "no progress, and no summary")
	return cmd
}

// sender is one echod send.
type sender struct {
	address         string
	timeout, giveUp time.Duration
	reconnect       bool
	lines, csv, raw bool
	noHeader        bool
	delimiter       string
	lazyQuotes      bool
	blockSize       string
	maxRecord       string
	verbatim        bool
	conns, inFlight int
	ordered         bool
	rate            float64
	strict          bool
	output          string
	failed, resume  string
	quiet           bool
	changed         func(flag string) bool
	in              io.Reader
	out, err        io.Writer
}

func (s *sender) run(ctx context.Context, args []string) error {
	for _, d := range []struct {
		flag  string
		value time.Duration
	}{{"timeout", s.timeout}, {"give-up", s.giveUp}} {
		if d.value < 0 {
			return usagef("--%s %s: must not be negative", d.flag, d.value)
		}
	}
	for _, target := range []struct{ flag, path string }{{"failed", s.failed}, {"resume", s.resume}} {
		if target.path == "-" {
			return usagef("--%s -: want the name of a file", target.flag)
		}
	}
	if s.output == "-" {
		s.output = "" // which is standard output, too
	}
	if len(args) == 0 || s.lines || s.csv || s.raw {
		return s.sendRecords(ctx, args)
	}
	for _, flag := range []string{
		"no-header", "delimiter", "lazy-quotes", "block-size", "max-record", "verbatim", "conns", "in-flight", "ordered", "rate", "strict", "output", "failed", "resume",
	} {
		if s.changed(flag) {
			return usagef("--%s: arguments are text, unless --lines, --csv or --raw says that they are files", flag)
		}
	}
	return interruptible(ctx, func(ctx context.Context) error { return s.sendText(ctx, args) })
}

// sendText sends one line.
func (s *sender) sendText(ctx context.Context, words []string) error {
	if s.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, s.timeout, fmt.Errorf("nothing within %s", s.timeout))
		defer cancel()
	}
	opts := client.Options{
		OnNotice:  func(n client.Notice) { fmt.Fprintf(s.err, "echod: %s\n", bulk.Printable(bulk.Describe(n))) },
		Reconnect: s.backoff(),
	}
	c, err := client.Dial(ctx, s.address, opts)
	if err != nil {
		return err
	}
	defer c.Close()
	echo, err := c.Echo(ctx, []byte(strings.Join(words, " ")+"\n"))
	_, werr := s.out.Write(echo)
	return errors.Join(err, werr)
}

// dial connects within --timeout.
func (s *sender) dial() client.DialFunc {
	if s.timeout == 0 {
		return nil
	}
	return func(ctx context.Context, address string) (net.Conn, error) {
		ctx, cancel := context.WithTimeoutCause(ctx, s.timeout, fmt.Errorf("not within %s", s.timeout))
		defer cancel()
		return client.DialConn(ctx, address, nil)
	}
}

func (s *sender) backoff() *client.Backoff {
	if !s.reconnect {
		return nil
	}
	return &client.Backoff{MaxElapsed: s.giveUp}
}

// sendRecords sends the inputs that the arguments name, or standard input.
func (s *sender) sendRecords(ctx context.Context, inputs []string) error {
	format, err := s.format()
	if err != nil {
		return err
	}
	plain := !s.lines && !s.csv && !s.raw // standard input, and nothing said about it
	if len(inputs) == 0 {
		inputs = []string{"-"}
	}
	if !plain && !s.changed("reconnect") {
		s.reconnect = true
	}
	ordered := s.ordered || s.conns == 1
	format.Pieces = plain && ordered && s.failed == "" // which come back as the line that they were
	opts := bulk.Options{
		Address: s.address, Inputs: inputs, Stdin: s.in, Records: format, Rate: s.rate, Strict: s.strict,
		Stream: client.StreamOptions{
			Dial: s.dial(), Conns: s.conns, InFlight: s.inFlight, Ordered: ordered, Reconnect: s.backoff(),
		},
	}
	if err := s.openFiles(&opts); err != nil {
		return err
	}
	opts.Display = s.display(plain)

	if !plain {
		signal.Ignore(syscall.SIGPIPE) // a reader that has gone is an error as others are
	}
	summary, err := s.bulk(ctx, opts)
	if !plain && !s.quiet || summary.Missing() > 0 && err == nil {
		fmt.Fprintf(s.err, "echod: %s\n", summary)
	}
	switch {
	case err != nil && s.resume != "" && !errors.Is(err, bulk.ErrNotSaved):
		return explain(fmt.Errorf("%w (the same command goes on from here: --resume %s)", err, s.resume))
	case err != nil && summary.Unread && !plain && s.resume == "":
		return explain(fmt.Errorf("%w (a run with --resume FILE can be gone on with)", err))
	case err != nil:
		return explain(err)
	case summary.Missing() > 0:
		return &exitError{code: exitFailed} // all has been said
	}
	return nil
}

// explain says why not all of the input was sent, where it is the server's end.
func explain(err error) error {
	if _, ended := errors.AsType[*client.NoticeError](err); ended {
		return fmt.Errorf("not all of the input was sent: %w", err)
	}
	if _, ended := errors.AsType[*client.EndError](err); ended {
		return fmt.Errorf("not all of the input was sent: %w", err)
	}
	return err
}

// format is what the flags say about the inputs.
func (s *sender) format() (records.Options, error) {
	opts := records.Options{Format: records.Lines, NoHeader: s.noHeader, LazyQuotes: s.lazyQuotes, Verbatim: s.verbatim}
	switch {
	case s.lines && s.csv, s.csv && s.raw, s.raw && s.lines:
		return opts, usagef("--lines, --csv and --raw: only one of them")
	case s.csv:
		opts.Format = records.CSV
	case s.raw:
		opts.Format = records.Raw
	}
	for flag, is := range map[string]bool{"no-header": s.csv, "delimiter": s.csv, "lazy-quotes": s.csv, "block-size": s.raw} {
		if s.changed(flag) && !is {
			return opts, usagef("--%s: only with %s", flag, map[bool]string{true: "--raw", false: "--csv"}[flag == "block-size"])
		}
	}
	delimiter := s.delimiter
	if delimiter == `\t` {
		delimiter = "\t"
	}
	r, size := utf8.DecodeRuneInString(delimiter)
	if size != len(delimiter) || size == 0 || slices.Contains([]rune{'"', '\r', '\n', utf8.RuneError}, r) {
		return opts, usagef("--delimiter %q: want one character", s.delimiter)
	}
	opts.Delimiter = r
	for _, c := range []struct {
		flag, size string
		to         *int
	}{{"block-size", s.blockSize, &opts.BlockSize}, {"max-record", s.maxRecord, &opts.MaxRecord}} {
		const largest = 16 << 20
		n, err := humanize.ParseBytes(c.size)
		if err != nil || n == 0 || n > largest {
			return opts, usagef("--%s %q: want a size up to 16MiB, such as 64KiB", c.flag, c.size)
		}
		*c.to = int(n)
	}
	for flag, n := range map[string]int{"conns": s.conns, "in-flight": s.inFlight} {
		if (n < 1 || n > 100_000) && (flag == "conns" || s.changed(flag)) {
			return opts, usagef("--%s %d: want a number from 1 to 100,000", flag, n)
		}
	}
	if !(s.rate >= 0) || math.IsInf(s.rate, 1) {
		return opts, usagef("--rate %v: want a number of records, or 0", s.rate)
	}
	return opts, nil
}

// display is how a run is told about: in bars on a terminal that is theirs, else in lines.
func (s *sender) display(plain bool) bulk.Display {
	if plain || s.quiet {
		return bulk.Events(s.err)
	}
	isTerminal := func(w io.Writer) bool {
		file, ok := w.(*os.File)
		return ok && term.IsTerminal(int(file.Fd()))
	}
	if file, ok := s.err.(*os.File); ok && (s.output != "" || !isTerminal(s.out)) { // else the echo would be drawn over
		if _, rows, err := term.GetSize(int(file.Fd())); err == nil {
			return bulk.Bars(s.err, rows)
		}
	}
	const every = 5 * time.Second
	return bulk.Lines(s.err, every)
}

// bulk runs it. The first signal stops reading, the second ends it. A terminal that is closed sends one, too, unless nohup has it ignored.
func (s *sender) bulk(ctx context.Context, opts bulk.Options) (summary bulk.Summary, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop, stopReading := context.WithCancelCause(ctx)
	var hangup []os.Signal
	if !signal.Ignored(syscall.SIGHUP) {
		hangup = append(hangup, syscall.SIGHUP)
	}
	var caught *exitError
	end := onInterrupt(func(e *exitError) {
		if stop.Err() == nil {
			caught = e
			opts.Display.Say("finishing what is in flight; once more ends it")
			stopReading(e)
		} else {
			cancel(e)
		}
	}, hangup...)
	summary, err = bulk.Run(ctx, stop, opts)
	end()
	if caught != nil && err != nil {
		return summary, &exitError{caught.code, err}
	}
	return summary, err
}
