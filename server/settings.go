package server

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Settings are the options of a server that can change while it serves; see Server.Configure. Zero and Off mean the
// same as in Options.
type Settings struct {
	Limits   Limits // except ReservedFiles, which cannot change
	Timeouts Timeouts
	Drain    DrainOptions  // defaults of later drains; a drain in progress does not change
	Access   Access        // for new connections; Server.KillFunc closes others
	LogLevel zapcore.Level // that of Options.LogLevel
}

// A setting reads and changes one of the Settings as text, in the form of an echod flag. Operators and successors use
// it.
type setting struct {
	name string
	get  func(*Settings) string
	set  func(*Settings, string) error
}

var settingTable = []setting{
	countSetting("max-conns", func(s *Settings) *int { return &s.Limits.MaxConns }),
	{
		"at-limit",
		func(s *Settings) string { return s.Limits.AtLimit.String() },
		func(s *Settings, text string) (err error) { s.Limits.AtLimit, err = ParseLimitMode(text); return err },
	},
	countSetting("max-conns-per-ip", func(s *Settings) *int { return &s.Limits.MaxConnsPerIP }),
	countSetting("max-conns-per-uid", func(s *Settings) *int { return &s.Limits.MaxConnsPerUID }),
	rateSetting("max-conn-rate", func(s *Settings) *Rate { return &s.Limits.MaxConnRate }),
	rateSetting("max-conn-rate-total", func(s *Settings) *Rate { return &s.Limits.MaxConnRateTotal }),
	rangesSetting("allow", func(s *Settings) *[]netip.Prefix { return &s.Access.Allow }),
	rangesSetting("deny", func(s *Settings) *[]netip.Prefix { return &s.Access.Deny }),
	durationSetting("idle-timeout", func(s *Settings) *time.Duration { return &s.Timeouts.Idle }),
	durationSetting("stall-timeout", func(s *Settings) *time.Duration { return &s.Timeouts.Stall }),
	durationSetting("max-conn-age", func(s *Settings) *time.Duration { return &s.Timeouts.MaxAge }),
	durationSetting("grace", func(s *Settings) *time.Duration { return &s.Drain.Grace }),
	durationSetting("drain-delay", func(s *Settings) *time.Duration { return &s.Drain.Delay }),
	durationSetting("spread", func(s *Settings) *time.Duration { return &s.Drain.Spread }),
	{
		"log-level",
		func(s *Settings) string { return s.LogLevel.String() },
		func(s *Settings, text string) error {
			level, err := zapcore.ParseLevel(text)
			if err != nil || level < zapcore.DebugLevel || level > zapcore.ErrorLevel {
				return fmt.Errorf("%q: want debug, info, warn or error", text)
			}
			s.LogLevel = level
			return nil
		},
	},
}

func countSetting(name string, field func(*Settings) *int) setting {
	return setting{
		name,
		func(s *Settings) string { return strconv.Itoa(max(0, *field(s))) },
		func(s *Settings, text string) error {
			n, err := strconv.Atoi(text)
			if err != nil || n < 0 {
				return fmt.Errorf("%q: want a number", text)
			}
			*field(s) = n
			return nil
		},
	}
}

func durationSetting(name string, field func(*Settings) *time.Duration) setting {
	return setting{
		name,
		func(s *Settings) string { return max(0, *field(s)).String() },
		func(s *Settings, text string) error {
			d, err := time.ParseDuration(text)
			if err != nil || d < 0 {
				return fmt.Errorf("%q: want a duration such as 1.5s", text)
			}
			if *field(s) = d; d == 0 {
				*field(s) = Off
			}
			return nil
		},
	}
}

func rateSetting(name string, field func(*Settings) *Rate) setting {
	return setting{
		name,
		func(s *Settings) string { return field(s).String() },
		func(s *Settings, text string) (err error) { *field(s), err = ParseRate(text); return err },
	}
}

// rangesSetting is a list of ranges, separated by commas.
func rangesSetting(name string, field func(*Settings) *[]netip.Prefix) setting {
	return setting{
		name,
		func(s *Settings) string {
			var texts []string
			for _, r := range *field(s) {
				texts = append(texts, r.String())
			}
			return strings.Join(texts, ",")
		},
		func(s *Settings, text string) error {
			var ranges []netip.Prefix
			for part := range strings.SplitSeq(text, ",") {
				if part = strings.TrimSpace(part); part == "" {
					continue
				}
				r, err := ParseRange(part)
				if err != nil {
					return err
				}
				ranges = append(ranges, r)
			}
			*field(s) = ranges
			return nil
		},
	}
}

// SettingNames returns the names of settings for Settings.Get and Settings.Set. They are the names of echod's flags.
func SettingNames() (names []string) {
	for _, setting := range settingTable {
		names = append(names, setting.name)
	}
	return names
}

// ErrUnknownSetting means that there is no setting with the given name.
var ErrUnknownSetting = errors.New("unknown setting")

// Get returns a setting as text, in the form of echod's flag; empty if its name is unknown.
func (s *Settings) Get(name string) string {
	for _, setting := range settingTable {
		if setting.name == name {
			return setting.get(s)
		}
	}
	return ""
}

// Set sets a setting from text, in the form of echod's flag: 0 disables a limit or a timeout. Lists are separated by
// commas. The error is ErrUnknownSetting, or says why the text is invalid.
func (s *Settings) Set(name, text string) error {
	for _, setting := range settingTable {
		if setting.name == name {
			return setting.set(s, text)
		}
	}
	return fmt.Errorf("%w: %s", ErrUnknownSetting, name)
}

// SettingChange is a setting that has changed.
type SettingChange struct{ Name, Old, New string }

// diffSettings returns the settings that differ.
func diffSettings(before, after Settings) (changes []SettingChange) {
	for _, setting := range settingTable {
		if from, to := setting.get(&before), setting.get(&after); from != to {
			changes = append(changes, SettingChange{setting.name, from, to})
		}
	}
	return changes
}

// activeSettings are the settings in force, with defaults filled in: zero disables. They are immutable.
type activeSettings struct {
	limits   Limits
	timeouts Timeouts
	drain    DrainOptions
	access   Access
	level    zapcore.Level
	rates    *rateLimits
}

// activeSettings returns the settings in force.
func (s *Server) activeSettings() *activeSettings {
	if l := s.settings.Load(); l != nil {
		return l
	}
	return &activeSettings{} // of a zero Server
}

// activeSettings returns the settings of options whose defaults are filled in.
func (o Options) activeSettings() *activeSettings {
	l := &activeSettings{
		limits: o.Limits, timeouts: o.Timeouts, drain: o.Drain, access: o.Access, rates: newRateLimits(o.Limits),
	}
	if o.LogLevel != nil {
		l.level = o.LogLevel.Level()
	}
	return l
}

// toSettings returns l in the form of Options.
func (l *activeSettings) toSettings() Settings {
	s := Settings{Limits: l.limits, Timeouts: l.timeouts, Drain: l.drain, Access: l.access, LogLevel: l.level}
	if s.Limits.MaxConns == math.MaxInt {
		s.Limits.MaxConns = Off
	}
	for _, d := range []*time.Duration{&s.Timeouts.Stall, &s.Drain.Grace, &s.Drain.Delay} {
		if *d == 0 {
			*d = Off
		}
	}
	s.Access = Access{Allow: slices.Clone(s.Access.Allow), Deny: slices.Clone(s.Access.Deny)}
	return s
}

// Settings returns the settings in force, with defaults filled in.
func (s *Server) Settings() (now Settings) {
	if s.log == nil {
		return now
	}
	return s.activeSettings().toSettings()
}

// Configure changes settings while the server serves: change gets the current ones, and may modify them. Either all
// changes take effect or, if change returns an error or a value is invalid, none. They take effect at once:
// clients that wait for a higher limit are admitted. A lower limit closes no connection.
//
// The changes are logged and published with their caller. They last until the server stops. A handover
// keeps them. change must not call the server, and may be called more than once.
func (s *Server) Configure(by Caller, change func(*Settings) error) (changes []SettingChange, err error) {
	if s.log == nil {
		return nil, errNotNew
	}
	for done := false; !done; {
		s.AwaitOwner()
		before := s.activeSettings()
		after := before.toSettings()
		if err := change(&after); err != nil {
			return nil, fmt.Errorf("configuring: %w", err)
		}
		next, err := s.validateSettings(before, after)
		if err != nil {
			return nil, fmt.Errorf("configuring: %w", err)
		}
		changes = diffSettings(before.toSettings(), next.toSettings())
		if done, err = s.replaceSettings(before, next, changes, by); err != nil {
			return nil, err
		}
	}
	for _, c := range changes {
		s.log.Info("setting changed", append([]zap.Field{
			zap.String("setting", c.Name), zap.String("old", c.Old), zap.String("new", c.New),
		}, by.fields("")...)...)
	}
	return changes, nil
}

// validateSettings returns after with defaults filled in, or an error that names each invalid setting.
func (s *Server) validateSettings(before *activeSettings, after Settings) (*activeSettings, error) {
	o := s.opts
	o.Logger = zap.NewNop()
	o.Limits, o.Timeouts, o.Drain, o.Access = after.Limits, after.Timeouts, after.Drain, after.Access
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	next := o.activeSettings()
	next.level = after.LogLevel
	switch {
	case after.Limits.ReservedFiles != before.limits.ReservedFiles:
		return nil, errors.New("option Limits.ReservedFiles: it cannot change while the server runs")
	case after.Limits.MaxConns > next.limits.MaxConns:
		return nil, fmt.Errorf("max-conns: %d: the limit on open files allows at most %d",
			after.Limits.MaxConns, next.limits.MaxConns)
	case next.level != before.level && s.opts.LogLevel == nil:
		return nil, errors.New("log-level: the server was made without Options.LogLevel")
	}
	was, is := &before.limits, &next.limits
	if is.MaxConnRate == was.MaxConnRate && is.MaxConnRateTotal == was.MaxConnRateTotal {
		next.rates = before.rates // keep the counts
	}
	return next, nil
}

// replaceSettings applies next. It does nothing if the current settings are no longer before, or if a handover has
// frozen the server. The error is a *DrainingError if another process has taken over.
func (s *Server) replaceSettings(before, next *activeSettings, changes []SettingChange, by Caller,
) (done bool, err error) {
	s.state.With(func(st *state) {
		switch {
		case st.frozen:
		case st.handedOver && st.drain != nil:
			err = &DrainingError{Deadline: st.drain.deadline}
		case s.settings.CompareAndSwap(before, next):
			if done = true; len(changes) > 0 {
				s.applyChanges(st, changes, by)
			}
		}
	})
	return done, err
}

// applyChanges makes new settings take effect.
func (s *Server) applyChanges(st *state, changes []SettingChange, by Caller) {
	if s.opts.LogLevel != nil {
		s.opts.LogLevel.SetLevel(s.activeSettings().level)
	}
	s.maxAgeCause.grace = s.activeSettings().drain.Grace
	st.recountClients()
	st.interruptAcceptors() // a loop that is accepting must check the new limit first
	select {
	case s.timeoutsChanged <- struct{}{}:
	default:
	}
	st.publish(Event{Type: EventSettings, Settings: changes, By: by})
}

// recountClients counts the connections of each client again, because a new limit may identify clients in another way,
// or count them for the first time.
func (st *state) recountClients() {
	clear(st.perClient)
	for _, c := range st.conns.all() {
		if c.admitted {
			st.countClient(c, +1)
		}
	}
}

// changedSettings lists the settings that differ from Options.
func (s *Server) changedSettings() []SettingChange {
	return diffSettings(s.initialSettings, s.activeSettings().toSettings())
}

// handoverSettings lists the settings that differ from Options, for a successor.
func (s *Server) handoverSettings() (changed []handoverSetting) {
	for _, c := range s.changedSettings() {
		changed = append(changed, handoverSetting{Name: c.Name, Value: c.New})
	}
	return changed
}

// restoreSettings applies the settings that the predecessor had changed, before any connection is served. It logs and
// ignores settings that this version does not know or that are invalid here.
func (s *Server) restoreSettings(changed []handoverSetting) {
	for _, c := range changed {
		before := s.activeSettings()
		after := before.toSettings()
		err := after.Set(c.Name, c.Value)
		if err == nil {
			after.Limits.MaxConns = min(after.Limits.MaxConns, Limits{}.withDefaults(zap.NewNop()).MaxConns)
			var next *activeSettings
			if next, err = s.validateSettings(before, after); err == nil {
				s.settings.Store(next)
			}
		}
		if err != nil {
			s.log.Warn("setting of the predecessor not taken over", zap.String("setting", c.Name),
				zap.String("value", c.Value), zap.Error(err))
		}
	}
	s.state.With(func(*state) { s.maxAgeCause.grace = s.activeSettings().drain.Grace })
	if s.opts.LogLevel != nil {
		s.opts.LogLevel.SetLevel(s.activeSettings().level)
	}
}
