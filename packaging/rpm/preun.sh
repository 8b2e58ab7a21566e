#!/bin/sh
# Before a removal. $1 is the number of versions that will be left. 0 means a real removal: drain the service.
if [ "$1" = 0 ] && [ -x /usr/bin/systemctl ]; then
	systemctl --no-reload disable --now echod.socket echod-control.socket echod.service || :
fi
