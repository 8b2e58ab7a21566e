#!/bin/sh
# Before a removal, but not before an upgrade: drain the service.
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
	deb-systemd-invoke stop echod.socket echod-control.socket echod.service
fi
