#!/bin/sh
# After a removal. $1 is the number of versions left. 1 means an upgrade: replace the running program, and keep
# its connections.
[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload || :
[ "$1" = 0 ] || /usr/lib/echod/upgrade-service || :
