package server

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
)

// lockedValue is a value with its lock. With calls a closure under the lock, so code cannot reach the value without the
// lock or forget to unlock. A locked must not be copied; go vet reports copies because of the mutex.
type lockedValue[T any] struct {
	mu    sync.Mutex
	value T
}

// With calls f with the value while it holds the lock. f must not block and must not use the same locked value.
func (l *lockedValue[T]) With(f func(*T)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f(&l.value)
}

// monitor is a lockedValue on which goroutines can wait for conditions.
type monitor[T any] struct {
	value   lockedValue[T]
	waiters []*waiter[T] // guarded by locked
}

type waiter[T any] struct {
	cond func(*T) bool
	met  chan struct{}
}

// With is like lockedValue.With. Then it wakes each waiter whose condition is true.
func (l *monitor[T]) With(f func(*T)) {
	l.value.With(func(v *T) {
		f(v)
		l.wakeWaiters(v)
	})
}

// Await returns nil once cond has returned true, or the cause of ctx when that ends first. Await calls cond under the
// lock after every With, so it misses no state, however brief. When cond returns true, it may also change the value,
// for example to take a place. It is not called again after that.
func (l *monitor[T]) Await(ctx context.Context, cond func(*T) bool) error {
	var w *waiter[T]
	l.value.With(func(v *T) {
		if cond(v) {
			l.wakeWaiters(v)
			return
		}
		w = &waiter[T]{cond: cond, met: make(chan struct{})}
		l.waiters = append(l.waiters, w)
	})
	if w == nil {
		return nil
	}
	select {
	case <-w.met:
		return nil
	case <-ctx.Done():
	}
	met := true // unless w still waits: the condition may have come true before the lock was taken
	l.value.With(func(*T) {
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

// wakeWaiters wakes the waiters whose conditions are true. A condition may change the value when it returns true, so
// wakeWaiters evaluates the others again. The caller holds the lock.
func (l *monitor[T]) wakeWaiters(v *T) {
	for again := true; again; {
		again = false
		for i := 0; i < len(l.waiters); {
			w := l.waiters[i]
			if !w.cond(v) {
				i++
				continue
			}
			l.waiters = slices.Delete(l.waiters, i, i+1)
			close(w.met)
			again = true
		}
	}
}

// writeLock is a mutex for writes, which may block for a long time. Waiters block on channels and not on a
// sync.Mutex, so that testing/synctest sees them as durably blocked. They get the lock in the order of their calls.
type writeLock struct {
	state   atomic.Int32
	waiters lockedValue[*lockWaiter]
}

const (
	lockFree      int32 = iota
	lockHeld            // no goroutine waits
	lockContended       // other goroutines wait
)

type lockWaiter struct {
	ready chan struct{}
	next  *lockWaiter
}

// TryLock takes the lock if it is free, and reports whether it did.
func (l *writeLock) TryLock() bool { return l.state.CompareAndSwap(lockFree, lockHeld) }

// Lock waits for the lock, and takes it.
func (l *writeLock) Lock() { l.LockOrCancel(nil) }

// LockOrCancel is like Lock, but gives up when canceled is closed. It reports whether it took the lock.
func (l *writeLock) LockOrCancel(canceled <-chan struct{}) bool {
	if l.TryLock() {
		return true
	}
	w := &lockWaiter{ready: make(chan struct{})}
	var waits bool
	l.waiters.With(func(first **lockWaiter) {
		for !l.TryLock() {
			if l.state.CompareAndSwap(lockHeld, lockContended) || l.state.Load() == lockContended {
				waits = true
				for *first != nil {
					first = &(*first).next
				}
				*first = w
				return
			}
		}
	})
	if !waits {
		return true
	}
	select {
	case <-w.ready:
		return true
	case <-canceled:
	}
	return !l.removeWaiter(w)
}

// removeWaiter removes w from the waiters. It reports false if w was given the lock already.
func (l *writeLock) removeWaiter(w *lockWaiter) (removed bool) {
	l.waiters.With(func(first **lockWaiter) {
		at := first
		for *at != nil && *at != w {
			at = &(*at).next
		}
		if removed = *at == w; !removed {
			return
		}
		*at = w.next
		if *first == nil {
			l.state.Store(lockHeld)
		}
	})
	return removed
}

// Unlock releases the lock, or gives it to the next waiter.
func (l *writeLock) Unlock() {
	if l.state.CompareAndSwap(lockHeld, lockFree) {
		return
	}
	l.waiters.With(func(first **lockWaiter) {
		w := *first
		if w == nil { // the last waiter has given up
			l.state.Store(lockFree)
			return
		}
		*first = w.next
		if *first == nil {
			l.state.Store(lockHeld)
		}
		close(w.ready)
	})
}
