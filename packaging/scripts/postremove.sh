#!/bin/sh
# After removing: systemd forgets the units, and on purge what was enabled or failed.
set -e
[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload
if [ "$1" = purge ]; then
	systemctl reset-failed echod.service echod.socket 2>/dev/null || true
fi
