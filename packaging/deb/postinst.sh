#!/bin/sh
# After unpacking: the socket is opened and the service started; after an upgrade the service is restarted behind the socket, which
# stays open all the while. What an administrator has disabled stays disabled.
set -e
case "$1" in configure | abort-upgrade | abort-deconfigure | abort-remove) ;; *) exit 0 ;; esac
for unit in echod.socket echod.service; do
	if deb-systemd-helper --quiet was-enabled $unit; then
		deb-systemd-helper enable $unit >/dev/null
	else
		deb-systemd-helper update-state $unit >/dev/null
	fi
done
deb-systemd-helper update-state echod-control.socket >/dev/null # which is there for who wants it
[ -d /run/systemd/system ] || exit 0
systemctl --system daemon-reload
deb-systemd-invoke start echod.socket || true # refused where the service runs without it
deb-systemd-invoke "${2:+re}start" echod.service || true
