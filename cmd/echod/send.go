package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/textproto"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"echod/client"
	"echod/internal/bulk"
	"echod/internal/records"
	"echod/internal/text"
)

func newSendCommand() *cobra.Command {
	var s sender
	cmd := &cobra.Command{
		Use:   "send [TEXT... | --lines|--csv|--raw [FILE|URL|-]...]",
		Short: "Send text, files, URLs or standard input, and print the echo",
		Long: `Send text, files, URLs or standard input, and print the echo.

With TEXT, send that as one line. Without arguments, send standard input as it is.

With --lines, --csv or --raw the arguments are files, http:// and https:// URLs, or -
for standard input. Records are sent over --conns connections, in constant memory, and
each echo is compared with what was sent. A CSV row is sent as a line of JSON with its
line number, and with several inputs, their names. gzip, zstd, bzip2, xz, and zip with
one member are unpacked. A byte order mark or --encoding selects the encoding of text,
which is sent as UTF-8. An input that cannot be read does not stop the others. Downloads
that fail are tried again, and continue where they broke off.

Notices of the server are reported on stderr, and not mixed with the echo. When the
server shuts down, records in flight are finished. With --reconnect, which files and URLs
imply, records that did not come back are sent again to the server or its successor, and
each echo is written once.

The first SIGINT, SIGTERM or SIGHUP stops reading and finishes what is in flight, the
second stops at once. With --resume FILE, the same command continues an earlier run, also
after SIGKILL or a full disk. It checks that the input is the same as far as it was read.
It truncates --output and --failed to the records that are done.

Exit codes: 0 everything came back, 1 something did not, 2 usage, 128+signal.`,
		Example: `  echod send hello
  echod send < file | cmp - file
  echod send --csv --conns 16 --ordered -o echo.jsonl people.csv.gz
  echod send --csv -d ';' -e windows-1252 people.csv
  echod send --lines --failed again.txt --resume state.json *.log
  echod send --lines -H 'Authorization: Bearer TOKEN' https://example.org/words`,
		RunE: func(cmd *cobra.Command, args []string) error {
			s.in, s.out, s.err = cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()
			s.flags = cmd.Flags()
			return s.run(cmd.Context(), args)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVarP(&s.address, "address", "a", "127.0.0.1:9999",
		"server's `address`: host:port, tls://host:port or\n"+
			"unix:///path")
	f.DurationVarP(&s.timeout, "timeout", "t", 10*time.Second,
		"`time` to connect, and for TEXT to come back;\n"+
			"0 is no limit")
	f.BoolVar(&s.reconnect, "reconnect", false,
		"connect again, after growing waits, when the server goes away or\n"+
			"is full")
	f.DurationVar(&s.giveUp, "give-up", time.Minute,
		"with --reconnect: `time` without any echo after which to give up;\n"+
			"0 is never")
	f.StringVar(&s.caCert, "cacert", "",
		"`file` of the CA certificates, in PEM, that verify https://\n"+
			"servers (default: those of the system)")
	s.tls.add(f)
	f.BoolVarP(&s.lines, "lines", "l", false, "send files and URLs line by line")
	f.BoolVar(&s.csv, "csv", false,
		"send files and URLs of CSV row by row, as JSON; the first row\n"+
			"names the columns")
	f.BoolVar(&s.raw, "raw", false, "send files and URLs in blocks of bytes")
	f.BoolVar(&s.noHeader, "no-header", false, "CSV: the first row is data")
	f.StringVarP(&s.delimiter, "delimiter", "d", ",", "CSV: `character` between fields, such as ; or \\t")
	f.BoolVar(&s.lazyQuotes, "lazy-quotes", false, "CSV: accept quotes within fields")
	f.BoolVar(&s.allowRagged, "allow-ragged", false,
		"CSV: accept rows with fewer or more fields than the header")
	f.StringVar(&s.comment, "comment", "", "CSV: skip lines that begin with this `character`")
	f.StringVarP(&s.encoding, "encoding", "e", "",
		"`name` of the text's encoding, such as utf-16, latin1 or shift_jis;\n"+
			"a byte order mark takes precedence (default: utf-8 for CSV, any\n"+
			"bytes for lines)")
	f.BoolVar(&s.replaceInvalid, "replace-invalid", false,
		"send U+FFFD for what cannot be decoded, and count it")
	f.StringVar(&s.blockSize, "block-size", "32KiB",
		"raw: `size` of a block, up to 16MiB; about 10 are\n"+
			"in memory")
	f.StringVar(&s.maxRecord, "max-record", "1MiB",
		"`size` of the longest line or row, up to 16MiB; several of that\n"+
			"size may be in memory for each connection")
	f.BoolVar(&s.verbatim, "verbatim", false, "do not unpack, and do not decode lines")
	f.StringArrayVarP(&s.header, "header", "H", nil,
		"`'Name: value'` to send with requests for URLs; may be repeated")
	f.IntVar(&s.retries, "retries", 5,
		"`number` of times in a row to repeat a request that failed and\n"+
			"may succeed later")
	f.IntVarP(&s.conns, "conns", "c", 1,
		"`number` of connections; with several, records come back in any\n"+
			"order")
	f.IntVar(&s.inFlight, "in-flight", 0,
		"`number` of records in flight over all connections (default: 64\n"+
			"for each); they are at most 1 MiB for each, and 4 MiB in all")
	f.BoolVar(&s.ordered, "ordered", false, "print the echoes in the order of the input")
	f.Float64VarP(&s.rate, "rate", "r", 0, "`records` per second; 0 is no limit")
	f.BoolVar(&s.strict, "strict", false, "stop at the first malformed record or input")
	f.StringVarP(&s.output, "output", "o", "", "`file` for the echo (default: standard output)")
	f.StringVar(&s.failed, "failed", "",
		"`file` for records that did not come back, to be sent again; an\n"+
			"existing one is replaced when the first record fails")
	f.StringVar(&s.resume, "resume", "", "`file` with the place to continue; removed when everything is done")
	f.BoolVarP(&s.quiet, "quiet", "q", false, "report errors only")
	completeValues(cmd, "encoding", "utf-8", "utf-16", "utf-16le", "utf-16be", "utf-32", "iso-8859-1", "windows-1252", "shift_jis", "gb18030")
	completeValues(cmd, "delimiter", ",", ";", "\\t", "|")
	return cmd
}

// A sender is one run of echod send.
type sender struct {
	address         string
	timeout, giveUp time.Duration
	reconnect       bool
	caCert          string
	lines, csv, raw bool

	noHeader, lazyQuotes, allowRagged bool
	delimiter, comment                string
	encoding                          string
	replaceInvalid                    bool
	blockSize, maxRecord              string
	verbatim                          bool
	header                            []string
	retries                           int

	conns, inFlight        int
	ordered                bool
	rate                   float64
	strict                 bool
	output, failed, resume string
	quiet                  bool

	flags     *pflag.FlagSet
	in        io.Reader
	out, err  io.Writer
	roots     *x509.CertPool // of --cacert; nil means those of the system
	tls       clientTLS
	tlsConfig *tls.Config // for the server; nil means crypto/tls's defaults
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
	for _, file := range []struct{ flag, path string }{{"failed", s.failed}, {"resume", s.resume}} {
		if file.path == "-" {
			return usagef("--%s -: want the name of a file", file.flag)
		}
	}
	if s.output == "-" {
		s.output = "" // "-" means standard output, too
	}
	if err := s.readCertificates(); err != nil {
		return err
	}
	if len(args) == 0 || s.lines || s.csv || s.raw {
		return s.sendRecords(ctx, args)
	}
	for _, flag := range []string{
		"no-header", "delimiter", "lazy-quotes", "allow-ragged", "comment", "encoding", "replace-invalid",
		"block-size", "max-record", "verbatim", "header", "retries", "conns", "in-flight", "ordered", "rate",
		"strict", "output", "failed", "resume",
	} {
		if s.flags.Changed(flag) {
			return usagef("--%s: arguments are text, unless --lines, --csv or --raw says that they are files", flag)
		}
	}
	return interruptible(ctx, func(ctx context.Context) error { return s.sendText(ctx, args) })
}

func (s *sender) readCertificates() (err error) {
	if s.address, err = s.tls.address(s.address); err != nil {
		return err
	}
	if s.tlsConfig, err = s.tls.config(s.err); err != nil {
		return err
	}
	if s.caCert == "" {
		return nil
	}
	pem, err := os.ReadFile(s.caCert)
	if err != nil {
		return usagef("--cacert: %w", err)
	}
	s.roots = x509.NewCertPool()
	if !s.roots.AppendCertsFromPEM(pem) {
		return usagef("--cacert %s: it has no certificate in PEM", s.caCert)
	}
	return nil
}

// sendText sends one line.
func (s *sender) sendText(ctx context.Context, words []string) error {
	if s.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, s.timeout, fmt.Errorf("nothing within %s", s.timeout))
		defer cancel()
	}
	opts := client.Options{TLSConfig: s.tlsConfig, Reconnect: s.backoff()}
	if !s.quiet {
		opts.OnNotice = func(n client.Notice) { fmt.Fprintf(s.err, "echod: %s\n", text.Printable(bulk.Describe(n))) }
	}
	c, err := client.Dial(ctx, s.address, opts)
	if err != nil {
		return err
	}
	defer c.Close()
	echo, err := c.Echo(ctx, []byte(strings.Join(words, " ")+"\n"))
	_, writeErr := s.out.Write(echo)
	return errors.Join(err, writeErr)
}

// dial connects within --timeout.
func (s *sender) dial(ctx context.Context, address string) (net.Conn, error) {
	if s.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, s.timeout, fmt.Errorf("not within %s", s.timeout))
		defer cancel()
	}
	return client.DialConn(ctx, address, s.tlsConfig)
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
	plain := !s.lines && !s.csv && !s.raw // send standard input unchanged
	if len(inputs) == 0 {
		inputs = []string{stdinName}
	}
	if !plain && !s.flags.Changed("reconnect") {
		s.reconnect = true
	}
	ordered := s.ordered || s.conns == 1
	format.Pieces = plain && ordered && s.failed == "" // in order, the pieces of a long line make up the line again
	format.Verbatim = format.Verbatim || plain
	format.NameRows = s.csv && len(inputs) > 1
	// Each record is an allocation. More frequent collections keep the memory close to the size of the records in flight.
	debug.SetGCPercent(50)
	const inFlightBytes = 1 << 20 // for each connection, up to 4 MiB
	opts := bulk.Options{
		Address: s.address, Inputs: inputs, Stdin: s.in, Records: format, Rate: s.rate, Strict: s.strict,
		Stream: client.StreamOptions{
			Dial: s.dial, Conns: s.conns, InFlight: s.inFlight, InFlightBytes: min(s.conns, 4) * inFlightBytes,
			Ordered: ordered, Reconnect: s.backoff(),
		},
		Display: s.newDisplay(plain),
	}
	if err := s.openFiles(&opts); err != nil {
		return err
	}
	if !plain {
		signal.Ignore(syscall.SIGPIPE) // if the reader exits, writing fails, and the state is saved
		ignoreBackgroundWrite()
	}
	summary, err := s.runBulk(ctx, opts)
	return s.reportResult(opts, summary, err, plain)
}

// reportResult reports how a run ended, and returns its exit code or error.
func (s *sender) reportResult(opts bulk.Options, summary bulk.Summary, err error, plain bool) error {
	if errors.Is(err, syscall.EPIPE) && s.output == "" && s.resume == "" {
		return &exitError{code: exitSignal + int(syscall.SIGPIPE)} // like a filter that SIGPIPE has ended
	}
	incomplete := summary.Missing() > 0 || summary.BadInputs > 0
	switch {
	case s.quiet && summary.Earlier > 0 && err == nil:
		fmt.Fprintf(s.err, "echod: %s failed in an earlier run\n", text.Count(summary.Earlier, "record"))
	case s.quiet:
	case !plain || incomplete && err == nil:
		fmt.Fprintf(s.err, "echod: %s\n", summary)
		if opts.Failed.Unchanged() {
			fmt.Fprintf(s.err, "echod: %s is unchanged, since no record failed\n", text.Printable(s.failed))
		}
	}
	_, badAddress := errors.AsType[*net.AddrError](err)
	_, badCertificate := errors.AsType[*tls.CertificateVerificationError](err)
	switch {
	case errors.Is(err, bulk.ErrStrict), badAddress, badCertificate: // the same command would fail again
		return err
	case err != nil && s.resume != "" && !errors.Is(err, bulk.ErrNotSaved):
		return fmt.Errorf("%w (the same command continues from here: --resume %s)", addUnsentHint(err), s.resume)
	case err != nil && summary.Unread && !plain && s.resume == "":
		return fmt.Errorf("%w (a run with --resume FILE can be continued)", addUnsentHint(err))
	case err != nil:
		return addUnsentHint(err)
	case incomplete:
		return &exitError{code: exitFailed} // everything was reported
	}
	return nil
}

// addUnsentHint adds to err that not all of the input was sent, if the server closed the connection.
func addUnsentHint(err error) error {
	_, notice := errors.AsType[*client.NoticeError](err)
	_, end := errors.AsType[*client.EndError](err)
	if notice || end {
		return fmt.Errorf("not all of the input was sent: %w", err)
	}
	return err
}

// format returns the format of the inputs, from the flags.
func (s *sender) format() (records.Options, error) {
	opts := records.Options{
		Format: records.Lines, NoHeader: s.noHeader, LazyQuotes: s.lazyQuotes, AllowRagged: s.allowRagged,
		Encoding: s.encoding, ReplaceInvalid: s.replaceInvalid, Verbatim: s.verbatim,
	}
	switch {
	case s.lines && s.csv, s.csv && s.raw, s.raw && s.lines:
		return opts, usagef("--lines, --csv and --raw: only one of them")
	case s.csv:
		opts.Format = records.CSV
	case s.raw:
		opts.Format = records.Raw
	}
	for _, c := range []struct {
		flag  string
		valid bool
		only  string
	}{
		{"no-header", s.csv, "--csv"},
		{"delimiter", s.csv, "--csv"},
		{"lazy-quotes", s.csv, "--csv"},
		{"allow-ragged", s.csv, "--csv"},
		{"comment", s.csv, "--csv"},
		{"encoding", s.csv || s.lines, "--csv or --lines"},
		{"replace-invalid", s.csv || s.lines, "--csv or --lines"},
		{"block-size", s.raw, "--raw"},
	} {
		if s.flags.Changed(c.flag) && !c.valid {
			return opts, usagef("--%s: only with %s", c.flag, c.only)
		}
	}
	if s.verbatim && s.lines && s.encoding != "" {
		return opts, usagef("--encoding: lines are not decoded with --verbatim")
	}
	var ok bool
	if opts.Delimiter, ok = singleRune(s.delimiter); !ok {
		return opts, usagef("--delimiter %q: want one character", s.delimiter)
	}
	if s.comment != "" {
		if opts.Comment, ok = singleRune(s.comment); !ok || opts.Comment == opts.Delimiter {
			return opts, usagef("--comment %q: want one character that is not the delimiter", s.comment)
		}
	}
	if err := records.CheckEncoding(s.encoding); err != nil {
		return opts, usagef("--encoding: %w", err)
	}
	for _, c := range []struct {
		flag, size string
		to         *int
	}{{"block-size", s.blockSize, &opts.BlockSize}, {"max-record", s.maxRecord, &opts.MaxRecord}} {
		n, err := humanize.ParseBytes(c.size)
		if err != nil || n == 0 || n > bulk.MaxRecordLimit {
			return opts, usagef("--%s %q: want a size up to 16MiB, such as 64KiB", c.flag, c.size)
		}
		*c.to = int(n)
	}
	for flag, n := range map[string]int{"conns": s.conns, "in-flight": s.inFlight} {
		if (n < 1 || n > 100_000) && (flag == "conns" || s.flags.Changed(flag)) {
			return opts, usagef("--%s %d: want a number from 1 to 100,000", flag, n)
		}
	}
	if !(s.rate >= 0) || math.IsInf(s.rate, 1) {
		return opts, usagef("--rate %v: want a number of records, or 0", s.rate)
	}
	var err error
	opts.HTTP, err = s.httpOptions()
	return opts, err
}

// singleRune returns the only character of a flag's value.
func singleRune(value string) (rune, bool) {
	if value == `\t` {
		value = "\t"
	}
	r, size := utf8.DecodeRuneInString(value)
	return r, size == len(value) && size > 0 && records.ValidDelimiter(r)
}

// httpOptions returns the options for requests of URLs, from the flags.
func (s *sender) httpOptions() (records.HTTPOptions, error) {
	opts := records.HTTPOptions{
		UserAgent: "echod/" + version, RootCAs: s.roots, Header: http.Header{}, Retries: cmp.Or(s.retries, -1),
	}
	if s.retries < 0 {
		return opts, usagef("--retries %d: must not be negative", s.retries)
	}
	for i, line := range s.header {
		name, value, ok := strings.Cut(line, ":")
		name, value = strings.TrimSpace(name), strings.TrimSpace(value)
		control := func(r rune) bool { return r <= ' ' || r > '~' }
		if !ok || name == "" || strings.ContainsFunc(name, control) || strings.ContainsAny(value, "\r\n\x00") {
			return opts, usagef("--header, number %d: want 'Name: value'", i+1) // the value is not printed, because it may be secret
		}
		name = textproto.CanonicalMIMEHeaderKey(name)
		opts.Header[name] = append(opts.Header[name], value)
	}
	return opts, nil
}

// newDisplay returns the display of a run: bars on a terminal, or lines if stderr is not a
// terminal or the echo goes to the same terminal.
func (s *sender) newDisplay(plain bool) bulk.Display {
	switch {
	case s.quiet:
		return bulk.Errors(s.err)
	case plain:
		return bulk.Events(s.err)
	}
	const every = 5 * time.Second
	terminal := terminalFile(s.err)
	if terminal == nil {
		return bulk.Lines(s.err, nil, every)
	}
	dumb := runtime.GOOS != "windows" && (os.Getenv("TERM") == "" || os.Getenv("TERM") == "dumb")
	if !dumb && (s.output != "" || terminalFile(s.out) == nil) {
		if bars, ok := bulk.Bars(terminal); ok {
			return bars
		}
	}
	return bulk.Lines(s.err, terminal, every)
}

// terminalFile returns w if it is a terminal, or nil.
func terminalFile(w io.Writer) *os.File {
	if file, ok := w.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		return file
	}
	return nil
}

// runBulk sends the records. The first signal stops reading, the second ends the run.
// SIGHUP counts, because closing the terminal sends it.
func (s *sender) runBulk(ctx context.Context, opts bulk.Options) (summary bulk.Summary, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop, stopReading := context.WithCancelCause(ctx)
	defer stopReading(nil)
	var caught *exitError
	end := onInterrupt(func(e *exitError) {
		if stop.Err() == nil {
			caught = e
			opts.Display.Say("finishing what is in flight; a second signal stops at once")
			stopReading(e)
		} else {
			cancel(e)
		}
	}, syscall.SIGHUP)
	summary, err = bulk.Run(ctx, stop, opts)
	end()
	if caught != nil && err != nil {
		return summary, &exitError{caught.code, err}
	}
	return summary, err
}

// stdinName is the argument that means standard input.
const stdinName = "-"

// openFiles opens the output files, before anything is sent or overwritten.
func (s *sender) openFiles(opts *bulk.Options) (err error) {
	if err := s.checkFiles(opts.Inputs); err != nil {
		return err
	}
	if s.resume != "" {
		if opts.State, err = bulk.OpenState(s.resume, opts.Inputs, opts.Records); err != nil {
			return err
		}
	}
	opts.Out = bulk.NewOutput(s.out)
	if s.output != "" {
		if opts.Out, err = bulk.OpenOutput(s.output); err != nil {
			return err
		}
	}
	if s.failed != "" {
		if opts.Failed, err = bulk.OpenFailedFile(s.failed, opts.Records); err != nil {
			return err
		}
	}
	return bulk.Prepare(opts.Out, opts.Failed, opts.State)
}

// A namedFile is a file that is read or written, and need not exist.
type namedFile struct {
	name string
	info os.FileInfo // nil: it does not exist
}

func statFile(name string) namedFile {
	info, _ := os.Stat(name) // opening the file returns the error
	return namedFile{name, info}
}

func statStream(name string, stream any) namedFile {
	if file, ok := stream.(*os.File); ok {
		if info, err := file.Stat(); err == nil {
			return namedFile{name, info}
		}
	}
	return namedFile{name: name}
}

// same reports whether both name the same regular file, which need not exist.
func (f namedFile) same(other namedFile) bool {
	if f.info != nil && other.info != nil {
		return f.info.Mode().IsRegular() && os.SameFile(f.info, other.info)
	}
	a, errA := filepath.Abs(f.name)
	b, errB := filepath.Abs(other.name)
	return f.info == nil && other.info == nil && errA == nil && errB == nil && a == b
}

// checkFiles checks that no file is both read and written, or written twice.
func (s *sender) checkFiles(inputs []string) error {
	var read, written []namedFile
	for _, name := range inputs {
		switch {
		case name == stdinName:
			read = append(read, statStream("standard input", s.in))
		case !strings.Contains(name, "://"):
			read = append(read, statFile(name))
		}
	}
	if s.output == "" {
		out := statStream("standard output", s.out)
		for _, in := range read {
			if out.info != nil && out.same(in) {
				return usagef("%s is also the output", in.name)
			}
		}
		written = append(written, out)
	}
	for _, target := range []struct{ flag, path string }{
		{"output", s.output}, {"failed", s.failed}, {"resume", s.resume},
	} {
		if target.path == "" {
			continue
		}
		file := statFile(target.path)
		if slices.ContainsFunc(read, file.same) {
			return usagef("--%s %s: the file is an input", target.flag, target.path)
		}
		if slices.ContainsFunc(written, file.same) {
			return usagef("--%s %s: the file is written for another purpose too", target.flag, target.path)
		}
		written = append(written, file)
	}
	return nil
}
