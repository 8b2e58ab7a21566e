#!/bin/sh
# Before removing. $1 is how many versions will be left: with 0, clients are told, and served to the end of the grace period.
if [ "$1" = 0 ] && [ -x /usr/bin/systemctl ]; then
	systemctl --no-reload disable --now echod.socket echod-control.socket echod.service || :
fi
