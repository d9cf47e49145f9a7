#!/usr/bin/env bash
# A test suite for bash and curl that controls smtpmock: .ci/control.sh [COMMAND [ARGUMENT...]]
# The command is "python3 -m smtpmock" by default. The exit status is 1 if a check fails.
set -euo pipefail
[ $# -gt 0 ] || set -- python3 -m smtpmock

fail() {
    echo "FAILED: $*" >&2
    exit 1
}

# The server's stdin and stdout are two descriptors of this script. When the script ends, in whatever way, so does its
# stdin, and the server stops.
coproc SERVER { exec "$@" -control -multipleRcptto; }
server=$SERVER_PID
exec {to}>&"${SERVER[1]}" {from}<&"${SERVER[0]}"
eval "exec ${SERVER[1]}>&-"

# Read the next event. With arguments: it must have these parts, such as '"event": "done"'.
event() {
    local part
    read -r -t 20 -u "$from" line || fail 'no event came in time'
    for part in "$@"; do
        [[ $line == *"$part"* ]] || fail "$part is not in $line"
    done
}

# The text of a field of the last event.
field() { sed -E "s/.*\"$1\": \"?([^\",}]*).*/\1/" <<<"$line"; }

# Send a command, and read its answer: ask COMMAND [PART...]
ask() {
    printf '%s\n' "$1" >&"$to"
    event "${@:2}"
}
obey() { ask "$1" '"event": "done"'; }

# Send a mail with curl: send STATUS [PART...]. The status is 0, or 55 for a refusal; the parts are in the record.
send() {
    local status=0
    curl -sS --max-time 20 "$url" --mail-from shop@example.com --mail-rcpt bob@example.com --mail-rcpt eve@example.com \
        -T - <<<$'Subject: Hello\r\n\r\nHow are you?\r' 2>/dev/null || status=$?
    [ "$status" -eq "$1" ] || fail "curl has exit status $status and not $1"
    event '"event": "message"' "${@:2}"
}

event '"event": "listening"'
url=$(field url)
echo "listening on $url"

send 0 '"mail_from": "shop@example.com"' '"rcpt_tos": ["bob@example.com", "eve@example.com"]' '"subject": "Hello"'
echo 'ok: a mail'

obey 'rule RCPT: reply 450 4.2.0 Greylisted; times=1'
send 55 '450 4.2.0 Greylisted'
send 0
obey check
echo 'ok: a rule that is used up'

obey 'rule message: reply 554 No'
ask check '"event": "error"' 'was never hit'
obey clear
send 0
echo 'ok: a rule that is never hit, and no more rules'

obey 'configure -notRegisteredEmails=eve@example.com -msgRcpttoNotRegisteredEmail="550 5.1.1 Not here"'
send 55 '550 5.1.1 Not here'
obey reset
send 0
ask purge '"event": "done"' '"messages": 0'
echo 'ok: options, and reset'

for bad in 'rule RCTP: close' 'configure -failFast -prot=1' 'no such command'; do
    ask "$bad" '"event": "error"' "\"command\": \"$bad\""
done
send 0
echo 'ok: bad commands change nothing'

exec {client}<>"/dev/tcp/127.0.0.1/${url##*:}"
printf 'EHLO a.com\r\n' >&"$client"
read -r -t 20 -u "$client" greeting && read -r -t 20 -u "$client" reply || fail 'no reply'
[[ $greeting == 220* && $reply == 250* ]] || fail "$greeting $reply"
printf 'disconnect\n' >&"$to"
! read -r -t 20 -u "$client" || fail 'the connection is still open'
event && event # the message and the answer, in any order
echo 'ok: a disconnect'

ask stop '"event": "done"' '"command": "stop"' '"messages": 2'
wait "$server" || fail "the server has exit status $?"
echo 'ok: stop'

# Without a stop, a server ends with its stdin.
"$@" -control </dev/null | grep -q '"command": "stop"' || fail 'it does not say that it stopped'
echo 'ok: the end of stdin'
