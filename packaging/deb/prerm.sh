#!/bin/sh
# Before removing, and not before an upgrade: clients are told, and served to the end of the grace period.
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
	deb-systemd-invoke stop echod.socket echod-control.socket echod.service
fi
