# A real Slurm cluster of virtual nodes on this machine, in one folder: nothing is mocked but the GPUs.
# Sourced; needs slurmctld, slurmd, munged (Debian: slurm-wlm, munge). Debian's build allows many slurmd on a host.
#
#   start_cluster FOLDER NUM_NODES     # nodes n0..., 64 cores, 1 TB and 8 GPUs each, as far as Slurm knows
#   stop_cluster FOLDER

FIRST_PORT=${FIRST_PORT:-26817}

start_cluster() {
    local folder=$1 num_nodes=$2 node host
    host=$(hostname -s)
    mkdir -p "$folder"/{ctld,log,munge,gpus}
    chmod 755 "$folder"
    for node in {0..7}; do ln -s /dev/null "$folder/gpus/$node"; done # a device is all Slurm asks for
    start_munge "$folder/munge"
    echo "CgroupAutomount=no" >"$folder/cgroup.conf"
    echo "NodeName=n[0-$((num_nodes - 1))] Name=gpu File=$folder/gpus/[0-7]" >"$folder/gres.conf"
    cat >"$folder/slurm.conf" <<EOF
ClusterName=storyanchors
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
# a job that is put back waits cred_expire + 1 s, 121 s if this is not set
AuthInfo=socket=$folder/munge/socket,cred_expire=5
# a slow answer would have the order to end a job sent again after 60 s, when it has been started again
MessageTimeout=100
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPort=$FIRST_PORT
SlurmctldPidFile=$folder/ctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdSpoolDir=$folder/spool-%n
StateSaveLocation=$folder/ctld
SlurmctldLogFile=$folder/log/ctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
SwitchType=switch/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=10
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=30
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n[0-$((num_nodes - 1))] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((FIRST_PORT + 1))-$((FIRST_PORT + num_nodes))] CPUs=64 RealMemory=1000000 Gres=gpu:8 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
EOF
    export SLURM_CONF=$folder/slurm.conf
    slurmctld -c -f "$SLURM_CONF"
    for ((node = 0; node < num_nodes; node++)); do
        slurmd -N "n$node" -f "$SLURM_CONF"
    done
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --Node --states=idle 2>/dev/null | awk '{print $1}' | sort -u | wc -l)" = "$num_nodes" ] &&
            return 0
        sleep 1
    done
    echo "error: not all of $num_nodes nodes came up; logs: $folder/log" >&2
    sinfo --Node --long >&2
    return 1
}

# munged refuses to run as root, and a key that others can read
start_munge() {
    local folder=$1 as=()
    head -c 1024 /dev/urandom >"$folder/key"
    chmod 400 "$folder/key"
    if [ "$(id -u)" = 0 ]; then
        chown -R munge: "$folder"
        as=(setpriv --reuid=munge --regid=munge --clear-groups)
    fi
    "${as[@]}" munged --key-file="$folder/key" --socket="$folder/socket" --pid-file="$folder/pid" \
        --log-file="$folder/log" --seed-file="$folder/seed"
}

stop_cluster() {
    local folder=$1 file jobs_left pids=() limit=$((SECONDS + 60))
    SLURM_CONF=$folder/slurm.conf timeout 30 scancel --user="$(id -un)" 2>/dev/null
    # a daemon that leaves first would leave slurmstepd and its ranks behind
    until jobs_left=$(SLURM_CONF=$folder/slurm.conf timeout 30 squeue --noheader 2>/dev/null) && [ -z "$jobs_left" ]; do
        [ $SECONDS -ge $limit ] && break
        sleep 0.5
    done
    for file in "$folder"/slurmd-*.pid "$folder"/ctld.pid "$folder"/munge/pid; do
        [ -f "$file" ] && pids+=("$(cat "$file")")
    done
    kill "${pids[@]}" 2>/dev/null
    while kill -0 "${pids[@]}" 2>/dev/null && [ $SECONDS -lt $limit ]; do sleep 0.5; done
}
