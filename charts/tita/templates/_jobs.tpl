{{- define "tita.jobs.serviceName" -}}
{{- printf "%s-jobs" (include "tita.fullname" .) -}}
{{- end -}}

{{/* Values of one job: `jobs`, overridden by `jobs.perJob.<name>`. Sections that were set to null are empty.
Arguments: root, name. */}}
{{- define "tita.jobs.values" -}}
{{- $jobs := .root.Values.jobs -}}
{{- $values := mergeOverwrite (deepCopy $jobs) (deepCopy (default dict (get (default dict $jobs.perJob) .name))) -}}
{{- range $section := list "resources" "scratch" "cache" "rdma" "kueue" "trackers" -}}
{{- if not (get $values $section) -}}{{- $_ := set $values $section dict -}}{{- end -}}
{{- end -}}
{{- toYaml $values -}}
{{- end -}}

{{/* Environment variables of a worker. Arguments: root, name, values, nodes, gpus, tries, recipe. */}}
{{- define "tita.jobs.env" -}}
- name: TITA_RUN
  valueFrom:
    fieldRef:
      fieldPath: metadata.labels['batch.kubernetes.io/job-name']
- name: TITA_RELEASE
  value: {{ .root.Release.Name | quote }}
- name: TITA_NAMESPACE
  valueFrom:
    fieldRef:
      fieldPath: metadata.namespace
- name: TITA_LAUNCH_UID
  valueFrom:
    fieldRef:
      fieldPath: metadata.labels['batch.kubernetes.io/controller-uid']
- name: TITA_TRIES
  value: {{ .tries | quote }}
- name: TITA_RECIPE
  value: {{ toJson .recipe | quote }}
- name: TITA_NUM_NODES
  value: {{ .nodes | quote }}
- name: TITA_NODE_RANK
  valueFrom:
    fieldRef:
      fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
- name: TITA_PROCS_PER_NODE
  value: {{ max 1 .gpus | quote }}
- name: TITA_GPUS
  value: {{ .gpus | quote }}
- name: TITA_MASTER_ADDR
  value: $(TITA_RUN)-0.{{ include "tita.jobs.serviceName" .root }}
- name: TITA_MASTER_PORT
  value: "29500"
- name: TITA_TERMINATION_LOG
  value: /dev/termination-log
# torchrun sends SIGKILL to its workers after this timeout. Its default of 30 s is too short for a checkpoint.
- name: TORCH_ELASTIC_SHUTDOWN_TIMEOUT
  value: {{ max 1 (sub (int .values.terminationGracePeriodSeconds) 30) | quote }}
{{ include "tita.storeEnv" .root }}
{{ include "tita.commonEnv" .root }}
{{ include "tita.volumeGib" (dict "name" "TITA_CACHE_VOLUME_GIB" "volume" .values.cache) }}
{{ include "tita.volumeGib" (dict "name" "TITA_SCRATCH_VOLUME_GIB" "volume" .values.scratch) }}
{{- if and (eq .name "benchmark") .root.Values.inference.auth.existingSecret }}
{{ include "tita.apiKeysEnv" .root }}
{{- end }}
{{- end -}}

{{/* Default recipe of the benchmark: query the inference Service of the release with weight 0 and with the
weights that the server gives a request without any. */}}
{{- define "tita.benchmark.recipe" -}}
{{- if .Values.inference.enabled -}}
{{- $inference := .Values.inference -}}
{{- $url := printf "http://%s:%v/v1" (include "tita.inference.name" .) $inference.service.port -}}
{{- $rewards := default dict $inference.rewards -}}
{{- $weight := float64 $inference.weight -}}
{{- $served := list $weight -}}
{{- $needsRewards := not (has (default "tita" $inference.form) (list "vcd" "m3id" "cfg")) -}}
{{- if $inference.weights -}}
{{- $each := dict -}}
{{- range $name, $own := $inference.weights -}}{{- $_ := set $each $name (float64 $own) -}}{{- end -}}
{{- $served = list $each -}}
{{- else if and $needsRewards $weight (gt (len $rewards) 1) -}}
{{- $each := dict -}}
{{- range $name, $_ := $rewards -}}
{{- $_ := set $each $name (divf $weight (len $rewards)) -}}
{{- end -}}
{{- $served = list $each -}}
{{- else if and $needsRewards (not $rewards) (not $inference.reward) -}}
{{- $served = list -}}
{{- end -}}
{{- dict "base_url" $url "model" $inference.modelName "weights" (concat (list 0.0) $served) | toJson -}}
{{- else -}}
{}
{{- end -}}
{{- end -}}
