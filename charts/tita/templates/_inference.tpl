{{- define "tita.inference.name" -}}
{{- printf "%s-inference" (include "tita.fullname" .) -}}
{{- end -}}

{{/* API keys of the inference server, for its clients. */}}
{{- define "tita.apiKeysEnv" -}}
{{- with .Values.inference.auth.existingSecret -}}
- name: TITA_API_KEYS
  valueFrom:
    secretKeyRef:
      name: {{ . | quote }}
      key: {{ $.Values.inference.auth.secretKey | quote }}
{{- end -}}
{{- end -}}

{{/* Environment variables of the inference server. */}}
{{- define "tita.inference.env" -}}
- name: TITA_GPUS
  value: {{ .Values.inference.gpus | int | quote }}
{{ include "tita.storeEnv" . }}
{{ include "tita.commonEnv" . }}
{{- end -}}

{{/* Volume source of the cache of downloaded models: a claim or the node's disk. */}}
{{- define "tita.inference.cacheVolume" -}}
{{- $cache := .Values.inference.cache -}}
{{- if $cache.persistence.enabled -}}
persistentVolumeClaim:
  claimName: {{ default (printf "%s-cache" (include "tita.inference.name" .)) $cache.persistence.existingClaim | quote }}
{{- else -}}
{{- include "tita.volumeSource" $cache -}}
{{- end -}}
{{- end -}}

{{/* Environment variables of the `helm test` pod. */}}
{{- define "tita.test.env" -}}
{{ include "tita.storeEnv" . }}
{{ include "tita.commonEnv" . }}
{{- if .Values.inference.enabled }}
- name: BASE_URL
  value: http://{{ include "tita.inference.name" . }}:{{ .Values.inference.service.port }}/v1
- name: MODEL
  value: {{ .Values.inference.modelName | quote }}
{{ include "tita.apiKeysEnv" . }}
{{- end }}
{{- end -}}
