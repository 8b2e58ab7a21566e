package records

import (
	"bytes"
	"strconv"
	"unicode/utf8"
)

// lineKey is the key of the number of the line in which a row begins.
const lineKey = "line"

// An object makes a row a line of JSON. Without names it has the fields in a list.
type object struct {
	limit int      // of a line, in bytes
	keys  [][]byte // `,"name":`, in the order of the columns
	buf   []byte
}

// name makes the keys of the names of the columns.
func (o *object) name(columns []string) {
	for _, name := range uniqueNames(columns) {
		o.keys = append(o.keys, append(appendString([]byte{','}, name), ':'))
	}
}

// uniqueNames returns the names of the columns, none of them twice nor lineKey.
// The first of a name keeps it.
func uniqueNames(columns []string) []string {
	names := make([]string, len(columns))
	taken := make(map[string]bool, len(columns))
	for i, name := range columns {
		if name == "" {
			name = "column" + strconv.Itoa(i+1)
		}
		names[i] = name
		taken[name] = true
	}
	last := map[string]int{lineKey: 1} // the number that was given to a name last
	for i, name := range names {
		for last[name]++; last[name] > 1; last[name]++ {
			numbered := name + "_" + strconv.Itoa(last[name])
			if !taken[numbered] {
				names[i], taken[numbered] = numbered, true
				break
			}
		}
	}
	return names
}

// of returns the line for a row, or nil if it exceeds the limit.
func (o *object) of(line int64, fields []string) []byte {
	b := append(o.buf[:0], `{"`+lineKey+`":`...)
	b = strconv.AppendInt(b, line, 10)
	closing := "}\n"
	if o.keys == nil {
		b = append(b, `,"fields":[`...)
		closing = "]}\n"
	}
	for i, field := range fields {
		switch {
		case o.keys != nil:
			b = append(b, o.keys[i]...)
		case i > 0:
			b = append(b, ',')
		}
		if b = appendString(b, field); len(b) > o.limit {
			break
		}
	}
	b = append(b, closing...)
	o.buf = b
	if len(b) > o.limit {
		return nil
	}
	return bytes.Clone(b)
}

// appendString appends s to b as a string of JSON. Bytes that are not UTF-8 become
// U+FFFD each.
func appendString(b []byte, s string) []byte {
	const hex = "0123456789abcdef"
	b = append(b, '"')
	from := 0 // of what is yet to be appended
	for i := 0; i < len(s); {
		c := s[i]
		if c >= utf8.RuneSelf {
			r, size := utf8.DecodeRuneInString(s[i:])
			if r == utf8.RuneError && size == 1 {
				b = append(append(b, s[from:i]...), "\ufffd"...)
				from = i + 1
			}
			i += size
			continue
		}
		if c >= ' ' && c != '"' && c != '\\' {
			i++
			continue
		}
		b = append(b, s[from:i]...)
		switch c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\n':
			b = append(b, `\n`...)
		case '\r':
			b = append(b, `\r`...)
		case '\t':
			b = append(b, `\t`...)
		default:
			b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&0xf])
		}
		i++
		from = i
	}
	return append(append(b, s[from:]...), '"')
}
