package server

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestAwait(t *testing.T) {
	t.Run("returns at once if the condition holds", bubbled(func(t *testing.T) {
		var n monitor[int]
		if err := n.Await(t.Context(), func(v *int) bool { return *v == 0 }); err != nil {
			t.Errorf("Await: %v", err)
		}
	}))

	t.Run("sees a state, however brief", bubbled(func(t *testing.T) {
		var n monitor[int]
		saw := make(chan error, 1)
		go func() { saw <- n.Await(t.Context(), func(v *int) bool { return *v == 1 }) }()
		synctest.Wait()
		n.With(func(v *int) { *v = 1 })
		n.With(func(v *int) { *v = 2 })
		if err := <-saw; err != nil {
			t.Errorf("Await: %v", err)
		}
	}))

	t.Run("lets only one waiter take a place", bubbled(func(t *testing.T) {
		const waiters = 100
		var places monitor[int]
		var all sync.WaitGroup
		for range waiters {
			all.Go(func() {
				_ = places.Await(context.Background(), func(v *int) bool {
					if *v == 0 {
						return false
					}
					*v--
					return true
				})
			})
		}
		synctest.Wait()
		for range waiters {
			places.With(func(v *int) {
				if *v != 0 {
					t.Errorf("%d places are free while others wait", *v)
				}
				*v++
			})
		}
		all.Wait()
		places.With(func(v *int) {
			if *v != 0 {
				t.Errorf("%d places left, want none", *v)
			}
		})
	}))

	t.Run("sees a condition that another waiter makes true", bubbled(func(t *testing.T) {
		var n monitor[int]
		step := func(from int) func(*int) bool {
			return func(v *int) bool {
				if *v != from {
					return false
				}
				*v++
				return true
			}
		}
		var all sync.WaitGroup
		for from := 5; from > 0; from-- { // the last waiter is the first whose condition comes true
			all.Go(func() { _ = n.Await(context.Background(), step(from)) })
			synctest.Wait()
		}
		n.With(func(v *int) { *v = 1 })
		all.Wait()
		n.With(func(v *int) {
			if *v != 6 {
				t.Errorf("value %d, want 6: every step once", *v)
			}
		})
	}))

	t.Run("returns the cause of its context", bubbled(func(t *testing.T) {
		var n monitor[int]
		why := errors.New("why")
		ctx, cancel := context.WithCancelCause(t.Context())
		got := make(chan error, 1)
		calls := 0
		go func() {
			got <- n.Await(ctx, func(*int) bool { calls++; return false })
		}()
		synctest.Wait()
		cancel(why)
		wantErr(t, "Await", <-got, why)
		before := calls
		n.With(func(*int) {})
		if calls != before {
			t.Error("the condition is still evaluated")
		}
	}))

	t.Run("reports a condition that was met, although its context ended", bubbled(func(t *testing.T) {
		var n monitor[int]
		ctx, cancel := context.WithCancel(t.Context())
		got := make(chan error, 1)
		go func() { got <- n.Await(ctx, func(v *int) bool { return *v > 0 }) }()
		synctest.Wait()
		n.With(func(v *int) {
			cancel() // wakes Await, which has to wait for the lock
			*v = 1
		})
		if err := <-got; err != nil {
			t.Errorf("Await: %v, although its condition was met", err)
		}
	}))
}

func TestWriteLock(t *testing.T) {
	t.Run("it has one holder at a time", func(t *testing.T) {
		var l writeLock
		var n int // guarded by l
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				for i := range 2000 {
					if i%3 > 0 {
						l.Lock()
					} else if !l.TryLock() {
						continue
					}
					n++
					l.Unlock()
				}
			})
		}
		all.Wait()
		if n == 0 || !l.TryLock() {
			t.Errorf("the lock was taken %d times, and is not free at the end", n)
		}
	})

	t.Run("it passes to the waiters in their order", bubbled(func(t *testing.T) {
		var l writeLock
		var order []int
		l.Lock()
		for i := range 5 {
			go func() {
				l.Lock()
				order = append(order, i)
				l.Unlock()
			}()
			synctest.Wait()
		}
		if l.TryLock() {
			t.Error("TryLock took a lock that is held")
		}
		l.Unlock()
		synctest.Wait()
		wantEqual(t, "order", order, []int{0, 1, 2, 3, 4})
	}))

	t.Run("a bubble sees its waiters as durably blocked", bubbled(func(t *testing.T) {
		var l writeLock
		l.Lock()
		go l.Lock()
		time.AfterFunc(time.Hour, l.Unlock) // time passes only when all goroutines are durably blocked
		synctest.Wait()
		pass(time.Hour)
		if l.TryLock() {
			t.Error("the lock did not pass to its waiter")
		}
	}))
}
