#!/bin/sh
# After unpacking. $1 is how many versions are installed now. The system's presets say whether a new service is enabled.
if [ "$1" = 1 ] && [ -x /usr/bin/systemctl ]; then
	systemctl --no-reload preset echod.socket echod.service || :
fi
