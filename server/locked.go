package server

import (
	"context"
	"sync"
)

// locked is a value that can be reached only while its lock is held: the lock is taken around a
// closure, so no path can touch the value unlocked or forget to unlock. It must not be copied,
// which go vet sees by the mutex.
type locked[T any] struct {
	mu      sync.Mutex
	value   T
	waiters []*waiter[T]
}

type waiter[T any] struct {
	cond  func(*T) bool
	fired chan struct{}
}

// With calls f with the value while holding the lock, then wakes whoever awaits what f made true.
// f must not block and must not call back into the same locked value.
func (l *locked[T]) With(f func(*T)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f(&l.value)
	l.settle()
}

// Await returns nil once cond has returned true, or the cause of ctx's end. cond is called under the
// lock after every With, so no state, however brief, is missed; what it does on the way to true (such
// as taking a place) is one step with having seen it. It is not called again after it returned true.
func (l *locked[T]) Await(ctx context.Context, cond func(*T) bool) error {
	l.mu.Lock()
	if cond(&l.value) { // mostly so: what is true already costs no waiter
		l.settle()
		l.mu.Unlock()
		return nil
	}
	w := &waiter[T]{cond: cond, fired: make(chan struct{})}
	l.waiters = append(l.waiters, w)
	l.mu.Unlock()

	select {
	case <-w.fired:
		return nil
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, other := range l.waiters {
		if other == w {
			l.waiters = append(l.waiters[:i], l.waiters[i+1:]...)
			return context.Cause(ctx)
		}
	}
	return nil // it came true before the lock was had
}

// settle lets every waiter look, again and again until none moves: one that comes true may change
// what another waits for.
func (l *locked[T]) settle() {
	for again := true; again; {
		again = false
		for i := 0; i < len(l.waiters); {
			w := l.waiters[i]
			if !w.cond(&l.value) {
				i++
				continue
			}
			l.waiters = append(l.waiters[:i], l.waiters[i+1:]...)
			close(w.fired)
			again = true
		}
	}
}
