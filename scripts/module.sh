#!/bin/sh
# Renames the Go module, in every module of the repository: module.sh example.org/you/echod
set -eu
cd "$(dirname "$0")/.."

new=${1:-}
case $new in
'' | /* | */ | *[!A-Za-z0-9./_~-]*)
	echo 'usage: make module MODULE=example.org/you/echod' >&2
	exit 2
	;;
esac
old=$(sed -n 's/^module //p' go.mod)
quoted=$(printf %s "$old" | sed 's/[.]/\\./g')
packages=$(for dir in */; do printf '%s|' "${dir%/}"; done)

# Changes import paths, and names such as echod/server.Conn, but not paths such as /run/echod/control.sock.
find . \( -name .git -o -name bin -o -name dist -o -name out -o -name coverage \) -prune -o -type f \
	\( -name '*.go' -o -name '*.md' -o -name '*.tmpl' -o -name '*.txtar' -o -name 'go.mod' \) -print |
	while read -r file; do
		case $file in
		*/go.mod) script="s#^(module |replace |require |	)$quoted(/[a-z]+)?( |\$)#\\1$new\\2\\3#" ;;
		*) script="s#$quoted/control\\.sock#@SOCKET@#g
			s#(^|[^A-Za-z0-9_./-])$quoted/(${packages%|})(\$|[^A-Za-z0-9_-])#\\1$new/\\2\\3#g
			s#@SOCKET@#$old/control.sock#g" ;;
		esac
		sed -E "$script" "$file" >"$file.renamed"
		cmp -s "$file" "$file.renamed" || cat "$file.renamed" >"$file" # keep the mode, and the time if nothing has changed
		rm "$file.renamed"
	done
go tool -modfile=tools/go.mod gofumpt -w . # imports may sort in another order
echo "module $old is $new now"
