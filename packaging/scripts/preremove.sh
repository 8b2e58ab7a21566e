#!/bin/sh
# Before removing, and not before an upgrade: clients are told, and served to the end of the grace period.
set -e
case "$1" in remove | 0) ;; *) exit 0 ;; esac
[ -d /run/systemd/system ] || exit 0
systemctl disable --now echod.socket echod.service
