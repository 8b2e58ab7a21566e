#!/bin/sh
# After an installation: open the socket and start the service. After an upgrade: restart the service; the socket
# stays open. Units that the administrator has disabled stay disabled.
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
deb-systemd-invoke "${2:+re}start" echod.service || true
