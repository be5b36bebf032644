#!/bin/bash
# The inside of the Slurm that slurm_lab.py starts. Runs as PID 1 of new namespaces: never call it by hand.
#
#   slurm_lab.sh controller FOLDER NODES     munged, slurmctld and a bridge; boots the nodes
#   slurm_lab.sh node FOLDER NAME ADDRESS    munged and slurmd of one node
#
# FOLDER holds slurm.conf, munge.key and, once it runs, logs. Every host has its own network, host name, process table,
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

case $role in
controller)
  hostname controller
  mount --bind "$folder/hosts" /etc/hosts
  ip link add bridge type bridge
  ip address add 10.77.0.254/24 dev bridge
  ip link set bridge up
  daemons slurmctld -i
  for ((number = 1; number <= $3; number++)); do
    unshare --net --uts --mount --pid --fork --kill-child --mount-proc \
      "$0" node "$folder" "n$number" "10.77.0.$number" >>"$folder/n$number.log" 2>&1 </dev/null &
    starter=$!
    until first=$(<"/proc/$starter/task/$starter/children") && [[ -n $first ]]; do sleep 0.01; done
    ip link add "to-n$number" type veth peer name eth0 netns "${first%% *}"
    ip link set "to-n$number" master bridge up
  done
  rest
  ;;
node)
  hostname "$3"
  until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
  ip address add "$4/24" dev eth0
  ip link set eth0 up
  daemons slurmd
  rest
  ;;
esac
