#!/bin/sh
# After a removal. $1 is the number of versions left. 1 means an upgrade: restart the service; the socket stays open.
[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload || :
[ "$1" = 0 ] || systemctl try-restart echod.service || :
