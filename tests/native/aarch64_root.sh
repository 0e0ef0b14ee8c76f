#!/usr/bin/env bash
# Makes a folder of Debian's packages for ARM, in which qemu-aarch64 runs Python: aarch64_root.sh FOLDER
#
# Uses the sources of this system, a Debian 12, with lists of its own: nothing on it changes, and who runs this need not be root.
set -euo pipefail
root=$(realpath -m "$1")
packages=(
  libbz2-1.0 libc6 libdb5.3 libexpat1 libffi8 libgcc-s1 liblzma5 libncursesw6 libnsl2 libreadline8 libsqlite3-0 libssl3 libstdc++6 libtinfo6
  libtirpc3 libuuid1 libpython3.11-minimal libpython3.11-stdlib python3.11-minimal zlib1g
)

rm -rf "$root.partial" && mkdir -p "$root.partial/apt/lists/partial" "$root.partial/apt/archives/partial"
cd "$root.partial/apt"
: > status
options=(
  -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User= -o Acquire::Languages=none
  -o Dir::State="$PWD" -o Dir::State::lists="$PWD/lists" -o Dir::State::status="$PWD/status" -o Dir::Cache="$PWD"
  -o Dir::Etc::sourcelist=/etc/apt/sources.list.d/debian.sources -o Dir::Etc::sourceparts=-
)
apt-get "${options[@]}" update
(cd archives && apt-get "${options[@]}" download "${packages[@]}")
for package in archives/*.deb; do
  dpkg -x "$package" ..
done
cd ../..
rm -rf "$root.partial/apt" "$root.partial/usr/share/doc"
rm -rf "$root" && mv "$root.partial" "$root"
