#!/bin/sh
# Makes the pictures of the README and the docs from the real program: a session in a terminal, echod top, and the status page.
# Needs tmux and Chromium. 'make bench-rollouts' makes docs/comparison.svg.
set -eu
cd "$(dirname "$0")/.."

root=$PWD
dir=$(mktemp -d)
tmux() { command tmux -L "echod-pictures-$$" "$@"; }
server='' load=''
stop() {
	for pid in $load $server; do
		kill "$pid" 2>/dev/null || true
	done
	tmux kill-server 2>/dev/null || true
	rm -rf "$dir"
}
trap stop EXIT
trap 'exit 1' INT TERM

CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-X main.version=v0.1.0' -o "$dir/echod" ./cmd/echod
go build -modfile=tools/go.mod -o "$dir/freeze" github.com/charmbracelet/freeze
PATH=$dir:$PATH
export PATH ECHOD_CONTROL="$dir/c"

# picture FILE: writes what the terminal shows as an SVG.
picture() {
	tmux capture-pane -e -p >"$dir/screen"
	"$dir/freeze" "$dir/screen" --language ansi --output "$1" --font.family monospace --padding 16 --border.radius 6 >/dev/null
}

# shows TEXT: waits until the terminal shows it.
shows() {
	tries=0
	until tmux capture-pane -p | grep -q -- "$1"; do
		tries=$((tries + 1))
		[ $tries -lt 300 ] || { echo "the terminal does not show '$1':"; tmux capture-pane -p; exit 1; } >&2
		sleep 0.1
	done
}

# enter COMMAND TEXT: types a command, and waits for the text.
enter() {
	tmux send-keys -l "$1"
	tmux send-keys Enter
	shows "$2"
}

terminal() { tmux new-session -d -x "$1" -y "$2" "env PS1='$ ' NO_COLOR= sh"; shows '\$'; }

echo '== a session'
echod serve --listen 127.0.0.1:9999 --http 127.0.0.1:9090 --grace 10s --log-level error &
server=$!
until echod ping --quiet 2>/dev/null; do sleep 0.1; done
terminal 96 25
enter 'echod ctl pause --reason backup --ttl 10m' paused:
enter 'echo hello | nc -N 127.0.0.1 9999 &' '\$'
until echod ctl status | grep -q '1 of'; do sleep 0.1; done
enter 'echod ctl status' process
enter 'echod ctl resume' Done
enter 'echod ctl upgrade' upgraded
enter 'echod ctl shutdown --reason deploy' draining
picture docs/session.svg
tmux kill-server
wait $server || true

echo '== top'
echod serve --listen 127.0.0.1:9999 --http 127.0.0.1:9090 --max-conns 500 --log-level error &
server=$!
until echod ping --quiet 2>/dev/null; do sleep 0.1; done
echod load --conns 120 --rate 4000 --churn 20s --size 64-2048 --duration 5m >/dev/null 2>&1 &
load=$!
terminal 100 24
enter 'echod top' RATE
sleep 15 # for the bars to show something
picture docs/top.svg
tmux kill-server

echo '== the status page'
sleep 100 # for the charts to show something
echod ctl pause --reason 'nightly backup' --ttl 10m
sleep 4
chromium=$(command -v chromium || command -v chromium-browser || command -v google-chrome)
"$chromium" --headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update \
	--disable-sync --hide-scrollbars --user-data-dir="$dir/profile" --window-size=1100,800 --timeout=5000 \
	--screenshot="$root/docs/status-page.png" http://127.0.0.1:9090/ 2>/dev/null
