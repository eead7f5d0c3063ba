{{- define "tita.jobs.serviceName" -}}
{{- printf "%s-jobs" (include "tita.fullname" .) -}}
{{- end -}}

{{/* The values of one job: those of all jobs, with its own laid over them. Arguments: root, name. */}}
{{- define "tita.jobs.values" -}}
{{- $jobs := .root.Values.jobs -}}
{{- mergeOverwrite (deepCopy $jobs) (deepCopy (default dict (get $jobs.perJob .name))) | toYaml -}}
{{- end -}}

{{/* What a worker finds in its environment. Arguments: root, name, values, nodes, gpus, recipe. */}}
{{- define "tita.jobs.env" -}}
- name: TITA_RUN
  valueFrom:
    fieldRef:
      fieldPath: metadata.labels['batch.kubernetes.io/job-name']
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
- name: TITA_MASTER_ADDR
  value: $(TITA_RUN)-0.{{ include "tita.jobs.serviceName" .root }}
- name: TITA_MASTER_PORT
  value: "29500"
- name: TITA_TERMINATION_LOG
  value: /dev/termination-log
# torchrun kills its workers 30 s after SIGTERM unless told that there is time to save.
- name: TORCH_ELASTIC_SHUTDOWN_TIMEOUT
  value: {{ max 1 (sub (int .values.terminationGracePeriodSeconds) 30) | quote }}
{{ include "tita.storeEnv" .root }}
{{ include "tita.writableEnv" .root }}
{{- if and (eq .name "benchmark") .root.Values.inference.auth.existingSecret }}
{{ include "tita.apiKeysEnv" .root }}
{{- end }}
{{- end -}}

{{- define "tita.inference.name" -}}
{{- printf "%s-inference" (include "tita.fullname" .) -}}
{{- end -}}

{{/* What the benchmark asks unless its recipe says otherwise: this release's inference Service,
with weight 0 and with the release's weight. */}}
{{- define "tita.benchmark.recipe" -}}
{{- if .Values.inference.enabled -}}
{{- $url := printf "http://%s:%v/v1" (include "tita.inference.name" .) .Values.inference.service.port -}}
{{- dict "base_url" $url "model" .Values.inference.modelName "weights" (list 0.0 .Values.inference.weight) | toJson -}}
{{- else -}}
{}
{{- end -}}
{{- end -}}

{{- define "tita.apiKeysEnv" -}}
{{- with .Values.inference.auth.existingSecret -}}
- name: TITA_API_KEYS
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.inference.auth.secretKey }}
{{- end -}}
{{- end -}}

{{/* What a replica finds in its environment. */}}
{{- define "tita.inference.env" -}}
{{ include "tita.storeEnv" . }}
{{ include "tita.writableEnv" . }}
{{- end -}}

{{/* What the pod of `helm test` finds in its environment. */}}
{{- define "tita.test.env" -}}
{{ include "tita.storeEnv" . }}
{{ include "tita.writableEnv" . }}
{{- if .Values.inference.enabled }}
- name: BASE_URL
  value: http://{{ include "tita.inference.name" . }}:{{ .Values.inference.service.port }}/v1
- name: MODEL
  value: {{ .Values.inference.modelName }}
{{ include "tita.apiKeysEnv" . }}
{{- end }}
{{- end -}}

{{/* Where a replica keeps downloaded models: a claim, or the node's disk. */}}
{{- define "tita.inference.cache" -}}
{{- $cache := .Values.inference.cache -}}
{{- if $cache.persistence.enabled -}}
persistentVolumeClaim:
  claimName: {{ default (printf "%s-cache" (include "tita.inference.name" .)) $cache.persistence.existingClaim }}
{{- else -}}
{{- include "tita.volumeSource" $cache -}}
{{- end -}}
{{- end -}}
