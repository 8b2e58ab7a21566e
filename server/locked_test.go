package server

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
)

func TestAwaitReturnsAtOnceWhenItHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n awaited[int]
		if err := n.Await(t.Context(), func(v *int) bool { return *v == 0 }); err != nil {
			t.Errorf("Await: %v", err)
		}
	})
}

func TestAwaitSeesAStateHoweverBrief(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n awaited[int]
		saw := make(chan error, 1)
		go func() { saw <- n.Await(t.Context(), func(v *int) bool { return *v == 1 }) }()
		synctest.Wait()
		n.With(func(v *int) { *v = 1 })
		n.With(func(v *int) { *v = 2 })
		if err := <-saw; err != nil {
			t.Errorf("Await: %v", err)
		}
	})
}

// Each waiter takes a place as it sees one: what two saw at once, only one would get.
func TestAwaitSeesAndActsInOneStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const waiters = 100
		var places awaited[int]
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
					t.Errorf("%d places left over while others wait", *v)
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
	})
}

func TestAwaitOfOneThatAnotherAwaitMakesTrue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n awaited[int]
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
		for from := 5; from > 0; from-- { // the last in line is the first that can
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
	})
}

func TestAwaitGivesUpWithTheCause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n awaited[int]
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
			t.Error("the condition of one who gave up is still asked")
		}
	})
}

// Whoever took a place must know it, also when its context ended right before.
func TestAwaitThatCameTrueNeverReportsTheEndOfItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n awaited[int]
		ctx, cancel := context.WithCancel(t.Context())
		got := make(chan error, 1)
		go func() { got <- n.Await(ctx, func(v *int) bool { return *v > 0 }) }()
		synctest.Wait()
		n.With(func(v *int) {
			cancel() // wakes Await, which cannot look yet
			*v = 1
		})
		if err := <-got; err != nil {
			t.Errorf("Await: %v, although its condition was seen to be true", err)
		}
	})
}
