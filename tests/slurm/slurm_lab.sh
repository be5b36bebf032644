#!/bin/bash
# The inside of the Slurm that slurm_lab.py starts. Runs as PID 1 of new namespaces: never call it by hand.
#
#   slurm_lab.sh controller FOLDER NODES     munged, slurmctld and a bridge; boots the nodes
#   slurm_lab.sh node FOLDER NAME ADDRESS    munged and slurmd of one node
#   slurm_lab.sh boot FOLDER NAME ADDRESS    give the bridge a new node of that name, in the controller's namespaces
#
# FOLDER holds slurm.conf, munge.key, a folder NAME.disk a node (its /mnt) and, once it runs, logs and the pid of each
# node's first process, NAME.pid, as the controller sees it. Every host has its own network, host name, process table,
# /run and /dev/shm; the rest of the file system is one for all, as a cluster's shared one.
set -euo pipefail
role=$1 folder=$2
export SLURM_CONF=$folder/slurm.conf
umask 022

daemons() { # munged, then the Slurm daemon of this host
  ip link set lo up
  mount -t tmpfs run /run
  mount -t tmpfs -o mode=1777 shm /dev/shm
  mkdir -m 755 /run/munge
  munged --force --key-file="$folder/munge.key" --log-file=/run/munge/munged.log \
    --pid-file=/run/munge/munged.pid --seed-file=/run/munge/munged.seed
  "$@"
}

rest() { # bash as PID 1 reaps what is left to it
  sleep infinity &
  wait $!
}

boot() { # NAME ADDRESS
  unshare --net --uts --mount --pid --fork --kill-child --mount-proc \
    "$0" node "$folder" "$1" "$2" >>"$folder/$1.log" 2>&1 </dev/null &
  local starter=$! first=
  until first=$(<"/proc/$starter/task/$starter/children") && [[ -n $first ]]; do sleep 0.01; done
  ip link add "to-$1" type veth peer name eth0 netns "${first%% *}"
  ip link set "to-$1" master bridge up
  echo "${first%% *}" >"$folder/$1.pid"
}

case $role in
boot)
  ip link delete "to-$3" 2>/dev/null || true
  boot "$3" "$4"
  ;;
controller)
  hostname controller
  mount --bind "$folder/hosts" /etc/hosts
  ip link add bridge type bridge
  ip address add 10.77.0.254/24 dev bridge
  ip link set bridge up
  daemons slurmctld -i
  for gpu in "$folder"/nvidia*; do # gres.conf wants character devices
    [[ ! -e $gpu ]] || mount --bind /dev/null "$gpu"
  done
  for ((number = 1; number <= $3; number++)); do boot "n$number" "10.77.0.$number"; done
  rest
  ;;
node)
  hostname "$3"
  until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
  mount --bind "$folder/$3.disk" /mnt
  ip address add "$4/24" dev eth0
  ip link set eth0 up
  daemons slurmd
  rest
  ;;
esac
