#!/bin/sh
# After installing or upgrading: the socket is opened, and the service started, or restarted behind the open socket.
set -e
[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload
case "$1" in
configure) fresh=${2:+no} ;; # dpkg: the version that was there before
*) [ "$1" = 1 ] || fresh=no ;; # rpm: how many versions there are
esac
if [ "$fresh" = no ]; then
	systemctl try-restart echod.service
else
	systemctl enable --now echod.socket echod.service
fi
