#!/bin/sh
# After an installation: open the socket and start the service. After an upgrade: replace the running program, and keep
# its connections. Units that the administrator has disabled stay disabled.
set -e
case "$1" in configure | abort-upgrade | abort-deconfigure | abort-remove) ;; *) exit 0 ;; esac
for unit in echod.socket echod.service; do
	if deb-systemd-helper --quiet was-enabled $unit; then
		deb-systemd-helper enable $unit >/dev/null
	else
		deb-systemd-helper update-state $unit >/dev/null
	fi
done
deb-systemd-helper update-state echod-control.socket >/dev/null # optional, so it is not enabled
[ -d /run/systemd/system ] || exit 0
systemctl --system daemon-reload
deb-systemd-invoke start echod.socket || true # fails if the port is in use; the journal says so
if [ -n "$2" ] && systemctl --system is-active --quiet echod.service; then
	# deb-systemd-invoke does not reload. A policy may forbid it.
	code=0
	[ ! -x /usr/sbin/policy-rc.d ] || /usr/sbin/policy-rc.d echod.service reload >/dev/null 2>&1 || code=$?
	case $code in 0 | 104) /usr/lib/echod/upgrade-service ;; esac
else
	deb-systemd-invoke start echod.service || true
fi
