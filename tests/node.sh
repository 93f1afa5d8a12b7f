# The first process of a node, in namespaces of its own: node.sh FOLDER ADDRESS GATEWAY. What it mounts and starts ends with it.
set -eu
cd "$1"
for place in /run /var/lib /var/log; do mount -t tmpfs tmpfs "$place"; done # where programs look for what is theirs
for place in /var/lib/containerd /var/lib/kubelet /var/lib/cni /var/log/pods /srv; do
  mkdir -p "$place" ".$place"
  mount --bind ".$place" "$place"
done
for pair in vm/overcommit_memory=1 kernel/panic=10 kernel/panic_on_oops=1; do # what a kubelet would set for the whole machine: it finds it set
  file=${pair%=*}
  echo "${pair#*=}" >"${file#*/}"
  mount --bind "${file#*/}" "/proc/sys/$file"
done
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done # the other end of a cable, put in from outside
ip link set lo up
ip addr add "$2/24" dev eth0
ip link set eth0 up
ip route add default via "$3"
while read -r net via; do ip route add "$net" via "$via"; done <routes
echo 1 >/proc/sys/net/ipv4/ip_forward
containerd --config containerd.toml >containerd.log 2>&1 &
until [ -S /run/containerd/containerd.sock ]; do sleep 0.05; done
. ./programs
wait -n
