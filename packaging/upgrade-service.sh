#!/bin/sh
# Upgrades the running service to the program that was just installed. The packages' scripts call it. It always succeeds:
# if the upgrade fails, the old program keeps running, and the output says why.
systemctl --system is-active --quiet echod.service || exit 0
since=$(date +%s)
if systemctl --system reload echod.service 2>/dev/null; then
	exit 0
fi
case $(systemctl --system show -p ExecReload --value echod.service) in
*status=4[!0-9]*)
	echo 'echod: the running version cannot be upgraded: restarting it'
	systemctl --system restart echod.service || true
	exit 0
	;;
esac
{
	echo 'echod: the service was not upgraded, and the old program keeps running:'
	journalctl -q -o cat --since "@$since" -u echod.service 2>/dev/null | sed -n 's/^echod: /  /p'
	echo "echod: to try again: systemctl reload echod; to end it and start the new program: systemctl restart echod"
} >&2
exit 0
