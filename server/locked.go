package server

import (
	"context"
	"slices"
	"sync"
)

// locked is a value that can be reached only while its lock is held: the lock is taken around a
// closure, so no path can touch the value unlocked or forget to unlock. It must not be copied,
// which go vet sees by the mutex.
type locked[T any] struct {
	mu    sync.Mutex
	value T
}

// With calls f with the value while holding the lock. f must not block and must not call back into the
// same locked value.
func (l *locked[T]) With(f func(*T)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f(&l.value)
}

// awaited is a locked value whose states can be waited for.
type awaited[T any] struct {
	locked  locked[T]
	waiters []*waiter[T] // guarded by the same lock
}

type waiter[T any] struct {
	cond  func(*T) bool
	fired chan struct{}
}

// With is locked.With, after which whoever awaits what f made true is woken.
func (l *awaited[T]) With(f func(*T)) {
	l.locked.With(func(v *T) {
		f(v)
		l.settle(v)
	})
}

// Await returns nil once cond has returned true, or the cause of ctx's end. cond is called under the
// lock after every With, so no state, however brief, is missed; what it does on the way to true (such
// as taking a place) is one step with having seen it. It is not called again after it returned true.
func (l *awaited[T]) Await(ctx context.Context, cond func(*T) bool) error {
	var w *waiter[T]
	l.locked.With(func(v *T) {
		if cond(v) {
			l.settle(v)
			return
		}
		w = &waiter[T]{cond: cond, fired: make(chan struct{})}
		l.waiters = append(l.waiters, w)
	})
	if w == nil {
		return nil
	}
	select {
	case <-w.fired:
		return nil
	case <-ctx.Done():
	}
	met := true // if it came true before the lock was had
	l.locked.With(func(*T) {
		if i := slices.Index(l.waiters, w); i >= 0 {
			l.waiters = slices.Delete(l.waiters, i, i+1)
			met = false
		}
	})
	if met {
		return nil
	}
	return context.Cause(ctx)
}

// settle lets every waiter look, again and again until none moves: one that comes true may change
// what another waits for. It needs the lock.
func (l *awaited[T]) settle(v *T) {
	for again := true; again; {
		again = false
		for i := 0; i < len(l.waiters); {
			w := l.waiters[i]
			if !w.cond(v) {
				i++
				continue
			}
			l.waiters = slices.Delete(l.waiters, i, i+1)
			close(w.fired)
			again = true
		}
	}
}
