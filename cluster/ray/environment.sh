# Sourced by the scripts beside it: one token for all nodes and clients of the cluster.
#
# Trap avoided: `ray start --head` without a token starts an open cluster with no more than a warning, and whoever
# reaches its ports can run code. Copy the token file to every node (scp -p keeps its mode).
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/reclora_token}"

if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
    if [ "${1:-}" != create ]; then
        echo "No token at $RAY_AUTH_TOKEN_PATH: copy it from the head node (scp -p), or set RAY_AUTH_TOKEN_PATH." >&2
        exit 1
    fi
    (
        umask 077 # of the token only: what Ray's workers write to a shared run folder, others may have to read
        mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
        python3 -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
    )
    echo "Wrote a new token to $RAY_AUTH_TOKEN_PATH; copy it to every node." >&2
fi
