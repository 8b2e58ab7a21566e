#!/bin/sh
# After an installation. $1 is the number of versions installed. The system's presets decide whether a new service is
# enabled.
if [ "$1" = 1 ] && [ -x /usr/bin/systemctl ]; then
	systemctl --no-reload preset echod.socket echod.service || :
fi
