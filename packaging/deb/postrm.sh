#!/bin/sh
# After a removal: make systemd forget the units. On a purge, forget also which were enabled.
set -e
if [ "$1" = purge ]; then
	deb-systemd-helper purge echod.socket echod-control.socket echod.service >/dev/null
fi
if [ -d /run/systemd/system ]; then
	systemctl --system daemon-reload
	systemctl reset-failed echod.socket echod-control.socket echod.service 2>/dev/null || true
fi
