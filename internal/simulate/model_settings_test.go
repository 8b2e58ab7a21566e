package simulate

import (
	"time"

	"echod/control"
)

// timeline is what a setting was. Its values are numbers, or durations in nanoseconds; 0 disables a limit or a timeout.
type timeline []struct {
	asked, answered time.Time // the change took effect between these
	value           int64
}

func (l *timeline) add(asked, answered time.Time, value int64) {
	*l = append(*l, struct {
		asked, answered time.Time
		value           int64
	}{asked, answered, value})
}

// last returns the value in force now.
func (l timeline) last() int64 { return l[len(l)-1].value }

// since returns since when, for certain.
func (l timeline) since() time.Time { return l[len(l)-1].answered }

// between returns the values that may have been in force at some time from..to.
func (l timeline) between(from, to time.Time) (values []int64) {
	for i, x := range l {
		if !x.asked.After(to) && (i+1 == len(l) || !l[i+1].answered.Before(from)) {
			values = append(values, x.value)
		}
	}
	return values
}

// most returns the highest limit from..to; 0 if there may have been none.
func (l timeline) most(from, to time.Time) (most int64) {
	for _, v := range l.between(from, to) {
		if v == 0 {
			return 0
		}
		most = max(most, v)
	}
	return most
}

// least returns the lowest limit from..to; 0 if there was none for certain.
func (l timeline) least(from, to time.Time) (least int64) {
	for _, v := range l.between(from, to) {
		if v > 0 && (least == 0 || v < least) {
			least = v
		}
	}
	return least
}

// checkSet notes a change of a setting. Only an upgrade refuses one.
func (m *model) checkSet(r *opResult, upgrading bool) {
	if r.code != 200 {
		if !upgrading {
			m.w.violate("settings change as requested", "%s: code %d", r.plan, r.code)
		}
		return
	}
	setting, value := map[string]*timeline{
		settingMaxConns: &m.maxConns, settingIdle: &m.idle, settingMaxAge: &m.maxAge, settingGrace: &m.grace,
	}[r.plan.Set], int64(r.plan.TTL)
	if r.plan.Set == settingMaxConns {
		value = int64(r.plan.Which)
	}
	// Without a limit on connections that of open files counts.
	if r.settings.Changed != (setting.last() != value) && (setting.last() != 0 || value != 0) {
		m.w.violate("settings change as requested", "%s: changed %v, and it was %d", r.plan, r.settings.Changed, setting.last())
	}
	setting.add(r.began, r.ended, value)
}

// checkSettings requires a status to show the settings that were made, also after an upgrade.
func (m *model) checkSettings(g *generation, st control.Status) {
	for name, pair := range map[string][2]float64{
		settingMaxAge: {st.MaxConnAgeSeconds, time.Duration(m.maxAge.last()).Seconds()},
		settingGrace:  {st.GraceSeconds, time.Duration(m.grace.last()).Seconds()},
	} {
		if pair[0]-pair[1] > 1e-3 || pair[1]-pair[0] > 1e-3 {
			m.w.violate("settings are as requested", "%s: %s is %v s, want %v s", g.name, name, pair[0], pair[1])
		}
	}
	if limit := int(m.maxConns.last()); limit > 0 && (st.MaxConns == nil || *st.MaxConns != limit) {
		m.w.violate("settings are as requested", "%s: %s is %v, want %d", g.name, settingMaxConns, deref(st.MaxConns), limit)
	}
}
