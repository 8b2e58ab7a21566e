package records_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"strings"

	"echod/internal/records"
)

// A malformed row does not stop those behind it.
func ExampleSource_All() {
	table := "name,born\nAda,1815\nGrace\nAlan,1912\n"
	source, err := records.New(strings.NewReader(table), "people.csv", records.Options{Format: records.CSV})
	if err != nil {
		log.Fatal(err)
	}
	defer source.Close()
	for record, err := range source.All() {
		if malformed, ok := errors.AsType[*records.Error](err); ok {
			fmt.Println(malformed)
			continue
		}
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%d: %s", record.Number, record.Data)
	}
	fmt.Println(source.Header())
	// Output:
	// 1: {"line":2,"name":"Ada","born":"1815"}
	// people.csv:3:1: wrong number of fields: 1 instead of 2
	// 3: {"line":4,"name":"Alan","born":"1912"}
	// [name born]
}

// A name is a file's, a URL, or "-".
func ExampleOpen() {
	source, err := records.Open(context.Background(), "-", strings.NewReader("one\ntwo\n"), records.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer source.Close()
	for record, err := range source.All() {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s:%d: %s", source.Name(), record.Line, record.Data)
	}
	// Output:
	// standard input:1: one
	// standard input:2: two
}
