package server

import (
	"bytes"
	"testing"
	"time"
)

func TestHandoverRecords(t *testing.T) {
	at := func(second int64) time.Time { return time.Unix(second, 5) }
	full := handoverConn{
		ID: 1 << 40, Listener: 2, Waiting: true, Submitted: true, Opened: at(1), Active: at(2), BytesIn: 3, BytesOut: 1 << 63,
		LastByte: 255, WriteClosed: true, Notified: true, Remote: "192.0.2.1:7", Labels: map[string]string{"user": "Ada"},
		ReadDeadline: at(3), WriteDeadline: at(4), DrainDeadline: at(5), DrainReason: "stop", DrainClosed: "deadline",
		State: []byte{0, '\n', 255}, Unsent: []byte("unsent"),
	}
	t.Run("come back as they were", func(t *testing.T) {
		var p []byte
		want := []handoverConn{full, {ID: 7}, {}}
		for _, r := range want {
			p = appendRecord(p, r.append(nil))
		}
		got, err := parseRecords(p)
		if err != nil {
			t.Fatal(err)
		}
		wantEqual(t, "records", got, want)
	})
	t.Run("may have fields of a later version", func(t *testing.T) {
		record := append(full.append(nil), 100<<1, 200, 1, 101<<1|1, 2, 'a', 'b')
		got, err := parseRecords(appendRecord(nil, record))
		if err != nil {
			t.Fatal(err)
		}
		wantEqual(t, "records", got, []handoverConn{full})
	})
	t.Run("that are cut off are refused", func(t *testing.T) {
		p := appendRecord(nil, full.append(nil))
		for n := 1; n < len(p); n++ {
			if _, err := parseRecords(p[:n]); err == nil {
				t.Errorf("%d bytes of %d were accepted", n, len(p))
			}
		}
	})
}

func FuzzHandoverRecords(f *testing.F) {
	r := handoverConn{ID: 7, Remote: "192.0.2.1:7", Labels: map[string]string{"user": "Ada"}, State: []byte("state")}
	f.Add(appendRecord(nil, r.append(nil)))
	f.Fuzz(func(t *testing.T, p []byte) {
		records, err := parseRecords(p)
		if err != nil {
			return
		}
		for _, r := range records {
			once := r.append(nil)
			var again handoverConn
			if err := again.parse(once); err != nil || !bytes.Equal(again.append(nil), once) {
				t.Errorf("%+v is encoded as %x, and that as %+v, %v", r, once, again, err)
			}
		}
	})
}
