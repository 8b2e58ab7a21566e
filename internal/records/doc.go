// Package records reads what is to be sent: files, standard input and URLs, as a
// stream of lines, of CSV rows as JSON, or of blocks, in constant memory.
//
// [Open] and [New] make a [Source], which unpacks gzip and zstd on the way;
// [Source.All] ranges over its records. A record that cannot be sent is an
// *[Error], after which reading goes on.
//
// # CSV
//
// Rows are read as [encoding/csv] does: empty lines are skipped, which in a file
// of one column means its empty values, there are no comments, and a line may end
// in CRLF, within quotes too, where it becomes LF. A byte order mark at the start
// is dropped. The first row names the columns, and each later one becomes
//
//	{"line":2,"name":"Ada","born":"1815"}
//
// and a newline: first the line of the source where the row begins, then the
// columns in their order, every value a string. Bytes that are not UTF-8 become
// U+FFFD each, as encoding/json has it. No two keys are equal: a name that is
// there already becomes "name_2", "name_3" and so on, where "line" is there from
// the start, and a column without a name becomes "column3" after its place.
// Without a header (Options.NoHeader) a row becomes
//
//	{"line":1,"fields":["Ada","1815"]}
//
// A row of more or fewer fields than the header, or the first row, is malformed; so is
// one with misplaced quotes. A quote that is never closed would swallow all that
// follows. So the error names the line where it opens, and the next row begins at
// the line after. Columns are counted in bytes, from 1.
//
// # Goroutines
//
// The package starts none, and leaves unpacking to the goroutine that ranges. The
// context package runs a function when the context of an open file ends, the time
// package when a URL has stalled, and net/http keeps goroutines for its
// connection; Close stops these, the last without waiting for them.
package records
