#!/bin/sh
# After a removal: reload systemd's units. On a purge, also remove which units were enabled, and the service's state:
# with DynamicUser=, /var/lib/echod is a link to /var/lib/private/echod (systemd.exec(5)).
set -e
if [ "$1" = purge ]; then
	deb-systemd-helper purge echod.socket echod-control.socket echod.service >/dev/null
	rm -rf /var/lib/echod /var/lib/private/echod
fi
if [ -d /run/systemd/system ]; then
	systemctl --system daemon-reload
	systemctl reset-failed echod.socket echod-control.socket echod.service 2>/dev/null || true
fi
