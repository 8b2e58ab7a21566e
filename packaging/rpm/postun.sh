#!/bin/sh
# After removing. $1 is how many versions are left: with 1 it was an upgrade, and the service is restarted behind its open socket.
[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload || :
[ "$1" = 0 ] || systemctl try-restart echod.service || :
